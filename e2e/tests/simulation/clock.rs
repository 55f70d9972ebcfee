//! Virtual time: tasks on one thread, in an order that follows from the seed. Nothing waits really: when no task can go on,
//! the clock jumps to the next instant at which one can.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures::future::{Either, select};

/// Whose task it is: all tasks of an owner die together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Kubelets, the scheduler, the network, users: they never die.
    World,
    /// The leading operator.
    Operator,
    /// The agent of a node.
    Agent(usize),
}

struct Task {
    owner: Owner,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

#[derive(Default)]
struct Inner {
    now: Cell<u64>,
    next: Cell<u64>,
    progress: Cell<bool>,
    random: Cell<u64>,
    spawned: RefCell<Vec<Task>>,
    killed: RefCell<Vec<Owner>>,
}

/// The clock, the dice and the tasks.
#[derive(Clone, Default)]
pub(crate) struct Clock(Rc<Inner>);

impl Clock {
    pub(crate) fn new(seed: u64) -> Self {
        let clock = Self::default();
        clock
            .0
            .random
            .set(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66);
        clock
    }

    /// Milliseconds since the beginning.
    pub(crate) fn now(&self) -> u64 {
        self.0.now.get()
    }

    /// A number below `bound` (splitmix64).
    pub(crate) fn below(&self, bound: u64) -> u64 {
        let state = self.0.random.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0.random.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound.max(1)
    }

    /// A number in a range.
    pub(crate) fn between(&self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub(crate) fn spawn(&self, owner: Owner, future: impl Future<Output = ()> + 'static) {
        self.0.progress.set(true);
        let future = Box::pin(future);
        self.0.spawned.borrow_mut().push(Task { owner, future });
    }

    /// Ends all tasks of an owner where they are, as SIGKILL does: when the present task waits again.
    pub(crate) fn kill(&self, owner: Owner) {
        self.0.killed.borrow_mut().push(owner);
    }

    pub(crate) async fn sleep(&self, millis: u64) {
        let until = self.now() + millis;
        std::future::poll_fn(|_| {
            if self.now() >= until {
                self.0.progress.set(true);
                return Poll::Ready(());
            }
            self.0.next.set(self.0.next.get().min(until));
            Poll::Pending
        })
        .await;
    }

    /// Waits until a condition holds. It is looked at whenever anything has happened.
    pub(crate) async fn until<T>(&self, mut holds: impl FnMut() -> Option<T>) -> T {
        std::future::poll_fn(|_| match holds() {
            Some(found) => {
                self.0.progress.set(true);
                Poll::Ready(found)
            }
            None => Poll::Pending,
        })
        .await
    }

    /// Asks to be woken at an instant, inside a condition of [`Clock::until`].
    pub(crate) fn wake_at(&self, instant: u64) {
        if instant > self.now() {
            self.0.next.set(self.0.next.get().min(instant));
        }
    }

    pub(crate) async fn timeout<T>(&self, millis: u64, work: impl Future<Output = T>) -> Option<T> {
        match select(Box::pin(work), Box::pin(self.sleep(millis))).await {
            Either::Left((done, _)) => Some(done),
            Either::Right(((), _)) => None,
        }
    }

    /// Runs until `done`, calling `check` after each turn of a task. False: `limit` is over, or nothing can go on any more.
    pub(crate) fn run(&self, limit: u64, mut done: impl FnMut() -> bool, mut check: impl FnMut() -> bool) -> bool {
        let mut tasks: Vec<Task> = Vec::new();
        let mut context = Context::from_waker(Waker::noop());
        loop {
            tasks.append(&mut self.0.spawned.borrow_mut());
            self.0.progress.set(false);
            self.0.next.set(u64::MAX);
            for i in (1..tasks.len()).rev() {
                let j = usize::try_from(self.below(i as u64 + 1)).unwrap_or(0);
                tasks.swap(i, j);
            }
            let mut i = 0;
            while i < tasks.len() {
                let ended = tasks[i].future.as_mut().poll(&mut context).is_ready();
                if ended {
                    drop(tasks.swap_remove(i));
                } else {
                    i += 1;
                }
                let killed = std::mem::take(&mut *self.0.killed.borrow_mut());
                if !killed.is_empty() {
                    self.0.spawned.borrow_mut().retain(|t| !killed.contains(&t.owner));
                    tasks.retain(|t| !killed.contains(&t.owner));
                    self.0.progress.set(true);
                    break;
                }
                if !check() {
                    return self.keep(tasks, false);
                }
            }
            if self.0.progress.get() || !self.0.spawned.borrow().is_empty() {
                continue;
            }
            if done() {
                return self.keep(tasks, true);
            }
            let next = self.0.next.get();
            if next > limit {
                return self.keep(tasks, false);
            }
            self.0.now.set(next);
        }
    }

    fn keep(&self, tasks: Vec<Task>, result: bool) -> bool {
        let mut spawned = self.0.spawned.borrow_mut();
        let new = std::mem::replace(&mut *spawned, tasks);
        spawned.extend(new);
        result
    }
}
