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

/// Length of the system call instruction, and of its encoding.
#[cfg(target_arch = "x86_64")]
const CALL: u64 = 2;
#[cfg(target_arch = "aarch64")]
const CALL: u64 = 4;

impl Stopped {
    /// Attaches and waits until it has stopped.
    ///
    /// # Errors
    /// See [`Error`]; nothing is attached then.
    pub fn stop(tid: i32, within: Duration) -> Result<Self, Error> {
        request(libc::PTRACE_SEIZE, tid, 0, 0).map_err(|e| Error::Attach(tid, e))?;
        let me = Self {
            tid,
            _here: std::marker::PhantomData,
        };
        request(libc::PTRACE_INTERRUPT, tid, 0, 0).map_err(|e| Error::Attach(tid, e))?;
        let deadline = Instant::now() + within;
        loop {
            let mut status = 0;
            // SAFETY: `status` is an int that outlives the call.
            let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if got == tid {
                if libc::WIFSTOPPED(status) {
                    return Ok(me);
                }
                std::mem::forget(me);
                return Err(Error::Ended(tid));
            }
            if got < 0 && Errno::last() != Errno::EINTR {
                std::mem::forget(me);
                return Err(Error::Ended(tid));
            }
            if Instant::now() > deadline {
                return Err(Error::Deadline(tid, within));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
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
    // SAFETY: the requests used here read or write only through `data`, which is 0 or an iovec that outlives the call.
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
