//! Who asks.

use std::sync::Arc;

/// Who asks for a score: the subject of a token, else the peer's IP address without its port. Shares of the queue
/// and limits are kept by it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caller(pub Arc<str>);

impl Default for Caller {
    fn default() -> Self {
        Self(Arc::from("anonymous"))
    }
}
