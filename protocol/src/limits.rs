//! Every maximum of what a peer may send. Checked before anything is allocated for it.

/// Control frames: one JSON message.
pub const CONTROL_BYTES: usize = 64 * 1024;
/// Large frames: the manifest and the facts of the freeze.
pub const LARGE_BYTES: usize = 1024 * 1024;
/// Data frames: a piece of a file, its header included.
pub const DATA_BYTES: usize = 1024 * 1024;

/// Containers of a pod.
pub const CONTAINERS: usize = 64;
/// Image files of one container.
pub const IMAGES: u64 = 65_536;
/// Files, folders, links and removals of one tree.
pub const TREE_ENTRIES: u64 = 1_000_000;
/// Files that are open at the same time.
pub const OPEN_FILES: usize = 1024;
/// Bytes of a path.
pub const PATH_BYTES: usize = 4096;
/// Bytes of one component of a path.
pub const NAME_BYTES: usize = 255;
/// Extended attributes of one file.
pub const XATTRS: usize = 64;
/// Bytes of an extended attribute's value.
pub const XATTR_BYTES: usize = 16 * 1024;
/// Bytes of an extended attribute's name.
pub const XATTR_NAME_BYTES: usize = 255;
/// Bytes of a reason or name.
pub const WORD_BYTES: usize = 256;
/// Bytes of a container's `descriptors.json`: three short names.
pub const DESCRIPTORS_BYTES: usize = 4096;
/// Bytes of a sentence.
pub const MESSAGE_BYTES: usize = 4096;
/// Addresses to be kept on the target's loopback.
pub const ADDRESSES: usize = 64;
/// Threads with attributes of their own.
pub const THREADS: usize = 8192;
/// Processors in an affinity mask.
pub const PROCESSORS: u32 = 8192;
/// Most bytes of a file, so that no sum overflows.
pub const FILE_BYTES: u64 = 1 << 50;
