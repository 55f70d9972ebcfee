//! Two narrow watches: the migrations of which this node is the source, and those of which it is the target. The API server
//! selects; an agent never sees the rest.

use futures::StreamExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};

use crds::ProcessMigration;

/// What a watch says.
#[derive(Clone, Debug)]
pub enum Seen {
    /// As it is now: at the start, and after every change.
    Present(Box<ProcessMigration>),
    /// Deleted, or no longer of this node.
    Gone(Box<ProcessMigration>),
}

/// Field that a watch selects by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// This node is the source.
    Source,
    /// This node is the target.
    Target,
}

impl Half {
    fn field(self) -> &'static str {
        match self {
            Half::Source => "status.source.nodeName",
            Half::Target => "status.target.nodeName",
        }
    }
}

/// Calls `seen` for every event of one half. Begins again by itself, with patience; never returns.
pub async fn follow(client: Client, node: String, half: Half, mut seen: impl FnMut(Seen)) {
    let migrations: Api<ProcessMigration> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("{}={node}", half.field()));
    let mut events = watcher(migrations, config).default_backoff().boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(migration) | watcher::Event::InitApply(migration)) => {
                seen(Seen::Present(Box::new(migration)));
            }
            Ok(watcher::Event::Delete(migration)) => seen(Seen::Gone(Box::new(migration))),
            Ok(watcher::Event::Init | watcher::Event::InitDone) => {}
            Err(error) => {
                tracing::warn!(
                    ?half,
                    error = crate::error::chain(&error),
                    "a watch failed; it begins again"
                );
            }
        }
    }
}
