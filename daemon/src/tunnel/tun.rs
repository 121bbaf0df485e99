//! The TUN device of the tunnels, with super-packets in both directions (linux/if_tun.h, linux/virtio_net.h).
//!
//! tun-rs opens it; reading and writing go past that library, which would copy each packet into a buffer of its own.
//! The device outlives the daemon, so that its routes stay and nothing falls back to a clear way.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::writev;
use tun_rs::DeviceBuilder;
use weft_wire::packet::VnetHeader;

/// How many packets wait in the device while the daemon is busy; while it is away, they are dropped.
const QUEUE: u32 = 1000;

/// An open device.
pub(super) struct Tun {
    device: OwnedFd,
    udp: bool,
    /// The kernel takes super-packets.
    super_packets: AtomicBool,
}

impl fmt::Debug for Tun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tun").field("udp", &self.udp).finish_non_exhaustive()
    }
}

impl Tun {
    /// Opens the device, or makes it. It is not brought up here.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let device = DeviceBuilder::new()
            .name(name)
            .inherit_enable_state()
            .with(|builder| {
                builder.offload(true).tx_queue_len(QUEUE);
            })
            .build_sync()?;
        device.persist()?;
        let flags = OFlag::from_bits_truncate(fcntl(device.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(device.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self::adopt(device.as_fd().try_clone_to_owned()?, device.udp_gso()))
    }

    /// Takes a device that another daemon opened with [`Tun::open`], offloads and all; `udp` as that one's.
    pub(super) fn adopt(device: OwnedFd, udp: bool) -> Self {
        Self { device, udp, super_packets: AtomicBool::new(true) }
    }

    /// Whether the kernel takes and gives super-packets of UDP.
    pub(super) fn udp(&self) -> bool {
        self.udp
    }

    /// Reads one (super-)packet behind its header, without waiting; returns the bytes of both.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.device, buffer)
    }

    /// Writes one (super-)packet; returns whether the kernel took it.
    pub(super) fn write(&self, header: VnetHeader, packet: &[u8]) -> bool {
        let bytes = header.write();
        let slices = [IoSlice::new(&bytes), IoSlice::new(packet)];
        loop {
            match writev(&self.device, &slices) {
                Ok(_) => return true,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    if error == Errno::EINVAL && header.gso_type != 0 {
                        self.super_packets.store(false, Ordering::Relaxed);
                    }
                    return false;
                }
            }
        }
    }

    /// Whether the kernel has taken every super-packet so far.
    pub(super) fn takes_super_packets(&self) -> bool {
        self.super_packets.load(Ordering::Relaxed)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}
