//! What the cipher alone takes of the processor time of encrypted pods: boringtun's sessions, and OpenSSL's cipher, on packets
//! of a full stream, without a network. All processors are at it at once, as they are under a full stream.

use std::process::Command;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};

/// An IP packet of a full stream, and what it carries: the headers of IPv4 and TCP with timestamps take the rest.
const PACKET: usize = 1440;
const PAYLOAD: usize = PACKET - 52;
/// So many packets are sealed, and then opened, as a super-packet would have them.
const RUN: usize = 46;
const LASTS: Duration = Duration::from_secs(1);

/// Returns the processor seconds that boringtun takes to seal and open 10⁹ bytes of payload.
pub fn boringtun() -> f64 {
    on_all_processors(sessions)
}

/// Returns the processor seconds that OpenSSL's ChaCha20-Poly1305 takes to seal and open 10⁹ bytes of payload, by its own
/// measuring.
pub fn openssl() -> f64 {
    on_all_processors(|| speed(&[])) + on_all_processors(|| speed(&["-decrypt"]))
}

/// Returns the mean of what a measuring finds on each processor.
fn on_all_processors(measure: impl Fn() -> f64 + Sync) -> f64 {
    let processors = std::thread::available_parallelism().expect("there is one").get();
    let sum: f64 = std::thread::scope(|scope| {
        let each: Vec<_> = (0..processors).map(|_| scope.spawn(&measure)).collect();
        each.into_iter().map(|thread| thread.join().expect("it does not panic")).sum()
    });
    sum / processors as f64
}

fn sessions() -> f64 {
    let secrets = [1, 2].map(|byte| StaticSecret::from([byte; 32]));
    let mut ends = [0, 1].map(|end: usize| {
        let other = PublicKey::from(&secrets[1 - end]);
        Tunn::new(secrets[end].clone(), other, None, None, u32::try_from(end).expect("small"), None)
    });
    shake(&mut ends);
    let [one, two] = &mut ends;
    let packet = packet();
    let mut sealed = vec![[0; PACKET + 32]; RUN];
    let mut opened = [0; PACKET + 32];
    let (mut runs, began) = (0_u32, Instant::now());
    while began.elapsed() < LASTS {
        for room in &mut sealed {
            assert!(matches!(one.encapsulate(&packet, room), TunnResult::WriteToNetwork(_)));
        }
        for datagram in &sealed {
            let result = two.decapsulate(None, datagram, &mut opened);
            assert!(matches!(result, TunnResult::WriteToTunnelV4(packet, _) if packet.len() == PACKET));
        }
        runs += 1;
    }
    began.elapsed().as_secs_f64() / (f64::from(runs) * (RUN * PAYLOAD) as f64) * 1e9
}

/// Makes a session between the two.
fn shake([one, two]: &mut [Tunn; 2]) {
    let [mut room, mut answer, mut confirmation] = [[0; 256]; 3];
    let TunnResult::WriteToNetwork(request) = one.format_handshake_initiation(&mut room, false) else {
        panic!("no request");
    };
    let TunnResult::WriteToNetwork(answer) = two.decapsulate(None, request, &mut answer) else {
        panic!("no answer");
    };
    let TunnResult::WriteToNetwork(confirmation) = one.decapsulate(None, answer, &mut confirmation) else {
        panic!("no confirmation");
    };
    assert!(matches!(two.decapsulate(None, confirmation, &mut room), TunnResult::Done));
}

/// An IPv4 packet, of which a session looks at the version, the length and the source.
fn packet() -> Vec<u8> {
    let mut packet = vec![0xa5; PACKET];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(PACKET).expect("it is below 65,536").to_be_bytes());
    packet
}

/// Returns the seconds that OpenSSL takes in one direction.
fn speed(direction: &[&str]) -> f64 {
    let words = ["speed", "-mr", "-seconds", "1", "-bytes", "1440", "-aead", "-evp", "chacha20-poly1305"];
    let output = Command::new("openssl").args(words).args(direction).output().expect("openssl runs");
    // +F:number:name:bytes a second.
    let text = String::from_utf8_lossy(&output.stdout);
    let rate =
        text.lines().find_map(|line| line.strip_prefix("+F:")?.rsplit(':').next()?.parse::<f64>().ok());
    1e9 / rate.expect("openssl tells a rate") * PACKET as f64 / PAYLOAD as f64
}
