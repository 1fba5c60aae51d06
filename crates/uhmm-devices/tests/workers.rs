//! The device's own threads.

mod common;

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use uhmm::{FaultError, MigrateOptions, Mm};
use uhmm_devices::soft::{AccessError, Command, JobError, SoftConfig, SoftDevice, StartError, SubmitError};
use uhmm_sys::thread::Kind;
use uhmm_testkit::isolated;

use crate::common::{MIB, Memory, PAGE, configs, register};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn commands_work_wherever_the_pages_are() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        for (config, kind) in configs(16 * MIB).into_iter().zip([Kind::Pthread, Kind::Raw]) {
            let mirror = mm.register(SoftDevice::new(&config).unwrap()).unwrap();
            let device = mirror.device();
            device.start(mirror.port().unwrap(), 3, kind).unwrap();
            let memory = Memory::new(1024);
            memory.fill();
            assert!(mirror.migrate(memory.part(100, 700), &MigrateOptions::default()).is_complete());
            let (addr, len) = (memory.addr(0, 0), 1024 * PAGE as u64);
            let mut sum = 0u64;
            let mut bytes = 0u64;
            let mut counts = [0u64; 256];
            for page in 0..1024 {
                for n in 0..512 {
                    let stamp = common::stamp(page, n);
                    sum = sum.wrapping_add(stamp);
                    for byte in stamp.to_ne_bytes() {
                        bytes += u64::from(byte);
                        counts[usize::from(byte)] += 1;
                    }
                }
            }
            let bins = Memory::new(1);
            let ask = |command| device.execute(command).expect("it runs");
            assert_eq!(ask(Command::Sum { addr, count: len / 8 }), Ok(sum));
            assert_eq!(ask(Command::Read { addr, len }), Ok(bytes));
            assert_eq!(ask(Command::Histogram { src: addr, len, bins: bins.addr(0, 0) }), Ok(len));
            assert_eq!((0..256).map(|n| bins.get(0, n)).collect::<Vec<_>>(), counts);
            memory.check();

            // Several at once, on halves.
            let half = len / 2;
            let tickets =
                [0, half].map(|at| device.submit(Command::Write { addr: addr.add(at), len: half, seed: at }).unwrap());
            for ticket in tickets {
                assert_eq!(ticket.wait(), Ok(half));
            }
            assert_eq!(memory.get(511, 511).to_le_bytes(), [0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff]);
            assert_eq!(ask(Command::Copy { dst: addr, src: addr.add(4), len: 8 }), Ok(8));
            assert_eq!(memory.get(0, 0).to_le_bytes(), [4, 5, 6, 7, 8, 9, 10, 11]);
            assert_eq!(ask(Command::Fill { addr, byte: 0, len }), Ok(len));
            let adds: Vec<_> =
                (0..8).map(|_| device.submit(Command::FetchAdd { addr, operand: 3, times: 500 }).unwrap()).collect();
            for _ in 0..1000 {
                memory.word(0, 0).fetch_add(5, Relaxed);
                std::thread::yield_now();
            }
            adds.into_iter().for_each(|ticket| assert!(ticket.wait().is_ok()));
            assert_eq!(memory.get(0, 0), 8 * 500 * 3 + 1000 * 5);

            let beyond = memory.addr(1023, 0).add(PAGE as u64);
            let tried = ask(Command::Fill { addr: memory.addr(1023, 0), byte: 9, len: 2 * PAGE as u64 });
            assert_eq!(tried, Err(JobError::Access(AccessError::Fault(FaultError::Denied { addr: beyond }))));
            assert!(device.stop(SOON));
            assert_eq!(device.submit(Command::Read { addr, len: 1 }).map(drop), Err(SubmitError::NotRunning));
            mirror.close().unwrap();
        }
        Ok(())
    });
}

#[test]
fn tickets_can_be_dropped_and_the_queue_has_an_end() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 2);
        let device = mirror.device();
        assert_eq!(device.start(mirror.port().unwrap(), 1, Kind::Raw), Err(StartError::Twice));
        let memory = Memory::new(64);
        memory.fill();
        let read = Command::Read { addr: memory.addr(0, 0), len: 64 * PAGE as u64 };
        let mut full = 0;
        for round in 0..3000 {
            match device.submit(read) {
                Ok(ticket) if round % 50 == 0 => assert!(ticket.wait().is_ok()),
                Ok(ticket) => drop(ticket),
                Err(SubmitError::Full) => full += 1,
                Err(error) => panic!("{error}"),
            }
        }
        let many = Command::Read { addr: memory.addr(0, 0), len: 64 * PAGE as u64 };
        let tickets: Vec<_> = std::iter::from_fn(|| device.submit(many).ok()).collect();
        assert!(!tickets.is_empty());
        println!("{} tickets, {full} times full", tickets.len());
        tickets.into_iter().for_each(|ticket| assert!(ticket.wait().is_ok()));
        // They end after what is in the queue, and are waited for no longer than was asked.
        let many = 200_000_000;
        let last = device.submit(Command::FetchAdd { addr: memory.addr(0, 0), operand: 1, times: many }).unwrap();
        assert!(!device.stop(Duration::from_millis(10)), "so much is not done in that time");
        assert!(matches!(device.submit(read), Err(SubmitError::NotRunning)));
        assert!(device.stop(SOON * 4));
        assert!(last.is_done());
        assert!(device.stop(SOON));
        Ok(())
    });
}
