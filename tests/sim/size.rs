//! What the mesh promises of its speed and its cost, at two sizes; `make bench-scale` measures more.

use weft_tests::figures::quantile;
use weft_tests::sim::size::sites::{self, Signers};
use weft_tests::sim::size::{Event, Measured, reconciler_work};

/// The slowest node's time, in seconds of virtual time.
fn worst(event: &Event) -> f64 {
    quantile(&event.times, 1.0)
}

#[test]
fn small_and_large_meshes_learn_as_fast_as_promised_and_cost_the_same_at_rest() {
    let (_, small) = Measured::measure(10, 2, "ten nodes");
    let (_, large) = Measured::measure(100, 1, "a hundred nodes");
    for size in [&small, &large] {
        println!("{size:?}");
        // Docs: docs/performance.md, "The mesh by size".
        assert!(worst(&size.join) <= 5.0, "join: {}", worst(&size.join));
        assert!(worst(&size.leave) <= 5.0, "leave: {}", worst(&size.leave));
        assert!(worst(&size.crash) <= 30.0, "crash: {}", worst(&size.crash));
        assert!(worst(&size.heal) <= 30.0, "heal: {}", worst(&size.heal));
    }
    let (ten, hundred) = (small.rest_bytes, large.rest_bytes);
    assert!(hundred <= ten * 1.25, "at rest a node of 10 sends {ten} bytes a second, one of 100 {hundred}");
}

#[test]
fn a_mesh_of_several_sites_keeps_the_same_promises() {
    let (_, small) = sites::measure(3, 4, Signers::One, "three small sites");
    let (_, large) = sites::measure(3, 20, Signers::One, "three larger sites");
    let (_, signing) = sites::measure(3, 4, Signers::All, "three small sites that all sign");
    // Docs: docs/performance.md, "Several sites by size".
    let bounds = [30.0, 10.0, 5.0, 30.0, 10.0, 30.0];
    for size in [&small, &large, &signing] {
        for ((what, event), bound) in size.events.iter().zip(bounds) {
            println!("{} nodes, {what}: {}", size.nodes, worst(event));
            assert!(worst(event) <= bound, "{} nodes, {what}: {}", size.nodes, worst(event));
        }
    }
    let (twelve, sixty) = (small.rest.0, large.rest.0);
    assert!(sixty <= twelve * 1.25, "at rest a node of 12 sends {twelve} bytes a second, one of 60 {sixty}");
}

#[test]
fn one_peer_more_is_three_changes_whatever_the_number_of_peers() {
    for nodes in [10, 1000] {
        let [all, none, one] = reconciler_work(nodes);
        assert!(all.changes >= (nodes - 1) * 3);
        assert_eq!((none.changes, one.changes), (0, 3), "{nodes} nodes");
    }
}
