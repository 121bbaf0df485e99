//! What is tried, by subject.

mod conformance;
mod life;
mod names;
mod pods;
mod rollout;
mod secrecy;
mod services;
mod trouble;
mod waves;

use crate::scene::Scene;

/// A name, which is the fact that it shows, and how.
pub type Case = (&'static str, fn(&Scene<'_>));

/// What holds on any pod network.
pub fn of_any_network() -> Vec<Case> {
    let mut all: Vec<Case> = vec![
        ("nodes_turn_ready", pods::nodes_turn_ready),
        ("pods_reach_pods_across_nodes_without_nat", pods::pods_reach_pods_across_nodes_without_nat),
        ("host_network_and_host_path_are_the_nodes_own", pods::host_network_and_host_path_are_the_nodes_own),
        ("names_resolve_through_coredns", names::names_resolve_through_coredns),
    ];
    all.extend(of_services());
    all.extend::<Vec<Case>>(vec![
        ("sixty_pods_in_waves_leak_no_address", waves::sixty_pods_in_waves_leak_no_address),
        ("pods_talk_while_the_api_is_gone_for_a_minute", life::pods_talk_while_the_api_is_gone_for_a_minute),
        ("a_node_is_deleted_and_added_again", life::a_node_is_deleted_and_added_again),
    ]);
    all
}

/// What weft's DaemonSet promises beyond.
pub fn of_weft() -> Vec<Case> {
    let mut all = of_any_network();
    all.extend::<Vec<Case>>(vec![
        ("a_rolling_restart_loses_nothing", rollout::a_rolling_restart_loses_nothing),
        ("an_upgrade_loses_nothing", rollout::an_upgrade_loses_nothing),
        ("a_pod_is_made_anew_while_the_api_is_gone", life::a_pod_is_made_anew_while_the_api_is_gone),
    ]);
    all
}

/// What holds where everything between nodes is encrypted.
pub fn of_encrypted_weft() -> Vec<Case> {
    let mut all = of_any_network();
    all.push(("nothing_is_in_clear_between_nodes", secrecy::nothing_is_in_clear_between_nodes));
    all
}

/// What holds where Kubernetes chooses the nodes' blocks.
pub fn of_node_podcidr() -> Vec<Case> {
    vec![
        ("nodes_turn_ready", pods::nodes_turn_ready),
        ("pods_reach_pods_across_nodes_without_nat", pods::pods_reach_pods_across_nodes_without_nat),
        ("pods_are_in_the_cidrs_of_their_nodes", pods::pods_are_in_the_cidrs_of_their_nodes),
        ("a_node_is_deleted_and_added_again", life::a_node_is_deleted_and_added_again),
        (
            "a_drained_node_disturbs_no_other_and_comes_back",
            life::a_drained_node_disturbs_no_other_and_comes_back,
        ),
        (
            "a_node_under_another_name_is_a_node_like_any_other",
            life::a_node_under_another_name_is_a_node_like_any_other,
        ),
        (
            "new_pods_are_in_the_cidrs_of_a_node_made_anew",
            pods::new_pods_are_in_the_cidrs_of_a_node_made_anew,
        ),
    ]
}

/// What a person is told who made a mistake, and that all is well again once it is mended.
pub fn of_trouble() -> Vec<Case> {
    vec![
        ("nodes_turn_ready", pods::nodes_turn_ready),
        ("missing_verbs_are_named", trouble::missing_verbs_are_named),
        ("an_older_definition_is_named", trouble::an_older_definition_is_named),
        ("a_network_before_wefts_is_named", trouble::a_network_before_wefts_is_named),
        ("pods_wait_for_a_daemon_that_is_late", trouble::pods_wait_for_a_daemon_that_is_late),
    ]
}

/// Kubernetes's own tests of its network, which take their time: only when they are named.
pub const CONFORMANCE: Case = ("conformance", conformance::of_networks);

/// What depends on kube-proxy too.
pub fn of_services() -> Vec<Case> {
    vec![
        ("cluster_ips_lead_to_every_pod_behind_them", services::cluster_ips_lead_to_every_pod_behind_them),
        ("node_ports_are_reached_from_outside", services::node_ports_are_reached_from_outside),
        (
            "external_ips_and_load_balancers_are_reached_from_outside",
            services::external_ips_and_load_balancers_are_reached_from_outside,
        ),
        ("host_ports_are_reached_from_outside", services::host_ports_are_reached_from_outside),
    ]
}
