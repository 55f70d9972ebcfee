//! A thread that is stopped by ptrace, long enough to look at its registers and to let an interrupted system call begin
//! again. It works on frozen threads too: in the v2 hierarchy a trap comes before the freezer's own wait, and after the
//! detach the thread is frozen again without having run an instruction of its own.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::{
    io,
    time::{Duration, Instant},
};

use nix::{errno::Errno, unistd::Pid};

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The thread could not be attached: it is gone, or another tracer has it.
    #[error("failed to attach to thread {0}")]
    Attach(i32, #[source] nix::Error),
    /// It did not stop.
    #[error("thread {0} did not stop within {1:?}")]
    Deadline(i32, Duration),
    /// It ended while it was to be stopped.
    #[error("thread {0} ended")]
    Ended(i32),
    /// Its registers could not be read or written.
    #[error("failed to access the registers of thread {0}")]
    Registers(i32, #[source] io::Error),
    /// Its signal mask could not be read or written.
    #[error("failed to access the signal mask of thread {0}")]
    Mask(i32, #[source] io::Error),
    /// Its seccomp filters could not be set aside, and one of them could kill it for a system call that it did not make.
    #[error("the seccomp filters of thread {0} could not be suspended")]
    Seccomp(i32, #[source] nix::Error),
    /// It did not come back from a system call that was made in it.
    #[error("thread {0} stopped in an unexpected way ({1:#x}) in a system call that was made in it")]
    Step(i32, i32),
}

/// What is needed to begin a system call again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Result register: `ax`, `x0`.
    pub result: i64,
    /// Address of the next instruction.
    pub next: u64,
}

/// A stopped thread; it goes on (or is frozen again) when this is dropped. Use and drop it in the thread that made it:
/// the kernel ties a tracee to one thread of the tracer.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    /// Not Send.
    _here: std::marker::PhantomData<*const ()>,
}

/// Length of the system call instruction.
#[cfg(target_arch = "x86_64")]
const CALL: u64 = 2;
#[cfg(target_arch = "aarch64")]
const CALL: u64 = 4;

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;

/// Where code (of a vDSO, which every program has) holds a system call instruction.
#[must_use]
pub fn find_call_instruction(code: &[u8]) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    return code.windows(2).position(|w| w == [0x0f, 0x05]);
    #[cfg(target_arch = "aarch64")]
    return code
        .chunks_exact(4)
        .position(|w| w == [0x01, 0x00, 0x00, 0xd4])
        .map(|i| i * 4);
}

fn has_seccomp(tid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    // Unknown is yes.
    !status
        .lines()
        .any(|l| l.strip_prefix("Seccomp:").is_some_and(|v| v.trim() == "0"))
}

impl Stopped {
    /// Attaches and waits until it has stopped.
    ///
    /// # Errors
    /// See [`Error`]; nothing is attached then.
    pub fn stop(tid: i32, within: Duration) -> Result<Self, Error> {
        request(libc::PTRACE_SEIZE, tid, 0, 0).map_err(|e| Error::Attach(tid, e))?;
        Self::interrupt(tid, within)
    }

    /// As [`Stopped::stop`], with the thread's seccomp filters set aside for as long as it is stopped: system calls that
    /// are made in it are not its own.
    ///
    /// # Errors
    /// See [`Error`]; nothing is attached then.
    pub fn stop_without_seccomp(tid: i32, within: Duration) -> Result<Self, Error> {
        const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;
        match request(libc::PTRACE_SEIZE, tid, 0, PTRACE_O_SUSPEND_SECCOMP) {
            Ok(()) => Self::interrupt(tid, within),
            // The kernel cannot (no CONFIG_CHECKPOINT_RESTORE), or we may not: harmless where there is no filter.
            Err(e @ (Errno::EPERM | Errno::EINVAL)) if has_seccomp(tid) => Err(Error::Seccomp(tid, e)),
            Err(Errno::EINVAL | Errno::EPERM) => Self::stop(tid, within),
            Err(e) => Err(Error::Attach(tid, e)),
        }
    }

    fn interrupt(tid: i32, within: Duration) -> Result<Self, Error> {
        let me = Self {
            tid,
            _here: std::marker::PhantomData,
        };
        request(libc::PTRACE_INTERRUPT, tid, 0, 0).map_err(|e| Error::Attach(tid, e))?;
        match me.wait(within) {
            Ok(_) => Ok(me),
            // Nothing to detach from.
            Err(error @ Error::Ended(_)) => {
                std::mem::forget(me);
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Waits for a stop; gives the wait status.
    fn wait(&self, within: Duration) -> Result<i32, Error> {
        let started = Instant::now();
        loop {
            let mut status = 0;
            // SAFETY: `status` is an int that outlives the call.
            let got = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if got == self.tid {
                return if libc::WIFSTOPPED(status) {
                    Ok(status)
                } else {
                    Err(Error::Ended(self.tid))
                };
            }
            if got < 0 && Errno::last() != Errno::EINTR {
                return Err(Error::Ended(self.tid));
            }
            let waited = started.elapsed();
            if waited > within {
                return Err(Error::Deadline(self.tid, within));
            }
            // A stop mostly takes some microseconds: a sleep would be longer than it.
            if waited > Duration::from_micros(200) {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Makes system calls in the stopped thread: `work` gets a function that makes one. Registers and signal mask are put
    /// back as they were, so that what the thread was doing goes on: an interrupted call begins again, with its restart block.
    ///
    /// `instruction` is the address of a system call instruction in the thread's memory. Nothing of its memory is changed.
    /// Were this process killed in the middle (some 50 µs), the thread would go on from that instruction.
    ///
    /// # Errors
    /// Registers or mask cannot be accessed, or the thread is killed. A call that fails is no error of this.
    pub fn make_calls<R>(
        &self,
        instruction: u64,
        within: Duration,
        work: impl FnOnce(&dyn Fn(u64, [u64; 3]) -> Result<i64, Error>) -> R,
    ) -> Result<R, Error> {
        let before = self.all()?;
        let mask = self.mask(PTRACE_GETSIGMASK, 0)?;
        // A signal that comes in the middle would run its handler in the place of our call.
        self.mask(PTRACE_SETSIGMASK, u64::MAX)?;
        let call = |number: u64, arguments: [u64; 3]| self.one_call(&before, instruction, within, number, arguments);
        let result = work(&call);
        let mut regs = before;
        let registers = self.set_all(&mut regs);
        self.mask(PTRACE_SETSIGMASK, mask)?;
        registers?;
        Ok(result)
    }

    fn one_call(
        &self,
        before: &libc::user_regs_struct,
        instruction: u64,
        within: Duration,
        number: u64,
        [a, b, c]: [u64; 3],
    ) -> Result<i64, Error> {
        let mut regs = *before;
        #[cfg(target_arch = "x86_64")]
        {
            regs.rax = number;
            (regs.rdi, regs.rsi, regs.rdx) = (a, b, c);
            regs.rip = instruction;
            // Not in a system call: or the kernel would look at `rax` as a result.
            regs.orig_rax = u64::MAX;
        }
        #[cfg(target_arch = "aarch64")]
        {
            regs.regs[8] = number;
            (regs.regs[0], regs.regs[1], regs.regs[2]) = (a, b, c);
            regs.pc = instruction;
        }
        self.set_all(&mut regs)?;
        loop {
            request(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)
                .map_err(|e| Error::Registers(self.tid, io::Error::from(e)))?;
            let stepped = self.wait(within);
            if matches!(stepped, Err(Error::Deadline(..))) {
                // Its cgroup was frozen in the meantime: it steps when it is thawed. Stopped, it can be put back as it was.
                request(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map_err(|e| Error::Attach(self.tid, e))?;
                self.wait(within)?;
            }
            let after = self.all()?;
            #[cfg(target_arch = "x86_64")]
            let (result, next) = (after.rax.cast_signed(), after.rip);
            #[cfg(target_arch = "aarch64")]
            let (result, next) = (after.regs[0].cast_signed(), after.pc);
            if next == instruction + CALL {
                return Ok(result);
            }
            let status = stepped?;
            // The stop of its group, or one that was under way when it was interrupted: it has not stepped yet.
            if status >> 16 == 0 || next != instruction {
                return Err(Error::Step(self.tid, status));
            }
        }
    }

    fn mask(&self, what: libc::c_uint, new: u64) -> Result<u64, Error> {
        let mut mask = new;
        request(what, self.tid, size_of::<u64>(), (&raw mut mask) as usize)
            .map_err(|e| Error::Mask(self.tid, io::Error::from(e)))?;
        Ok(mask)
    }

    /// Reads the registers.
    ///
    /// # Errors
    /// [`Error::Registers`].
    pub fn registers(&self) -> Result<Registers, Error> {
        let all = self.all()?;
        #[cfg(target_arch = "x86_64")]
        let found = Registers {
            result: all.rax.cast_signed(),
            next: all.rip,
        };
        #[cfg(target_arch = "aarch64")]
        let found = Registers {
            result: all.regs[0].cast_signed(),
            next: all.pc,
        };
        Ok(found)
    }

    /// Lets the system call `number`, from which the thread was about to return, begin again. `first` is its first
    /// argument: on arm64 the result has replaced it.
    ///
    /// # Errors
    /// [`Error::Registers`]; nothing was changed.
    pub fn call_again(&self, number: u64, first: u64) -> Result<(), Error> {
        let mut all = self.all()?;
        #[cfg(target_arch = "x86_64")]
        {
            let _ = first;
            all.rax = number;
            all.rip = all.rip.wrapping_sub(CALL);
            // Not in a system call: or the kernel would look at `rax` as a result.
            all.orig_rax = u64::MAX;
        }
        #[cfg(target_arch = "aarch64")]
        {
            all.regs[0] = first;
            all.regs[8] = number;
            all.pc = all.pc.wrapping_sub(CALL);
        }
        self.set_all(&mut all)
    }

    fn all(&self) -> Result<libc::user_regs_struct, Error> {
        // SAFETY: a struct of integers; all zero is valid.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.set(libc::PTRACE_GETREGSET, &mut regs)?;
        Ok(regs)
    }

    fn set_all(&self, regs: &mut libc::user_regs_struct) -> Result<(), Error> {
        self.set(libc::PTRACE_SETREGSET, regs)
    }

    fn set(&self, what: libc::c_uint, regs: &mut libc::user_regs_struct) -> Result<(), Error> {
        const NT_PRSTATUS: usize = 1;
        let mut vector = libc::iovec {
            iov_base: std::ptr::from_mut(regs).cast(),
            iov_len: size_of::<libc::user_regs_struct>(),
        };
        request(what, self.tid, NT_PRSTATUS, (&raw mut vector) as usize)
            .map_err(|e| Error::Registers(self.tid, io::Error::from(e)))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // A thread that is not stopped any more was killed: then there is nothing to detach from.
        let _ = request(libc::PTRACE_DETACH, self.tid, 0, 0);
    }
}

fn request(what: libc::c_uint, tid: i32, address: usize, data: usize) -> Result<(), Errno> {
    // SAFETY: the requests used here read or write only through `data`, which is 0, flags, or an iovec or signal mask that
    // outlives the call.
    let result = unsafe { libc::ptrace(what, Pid::from_raw(tid).as_raw(), address, data) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::unix::process::CommandExt as _,
        process::{Command, Stdio},
    };

    #[test]
    fn a_sleeping_thread_is_stopped_and_goes_on() {
        let mut child = Command::new("/bin/sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        {
            let stopped = Stopped::stop(pid, Duration::from_secs(5)).unwrap();
            stopped.registers().unwrap();
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(stat.contains("TracerPid:\t0"));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_thread_that_does_not_exist_is_said() {
        assert!(matches!(
            Stopped::stop(i32::MAX, Duration::from_secs(1)),
            Err(Error::Attach(..))
        ));
    }
}
