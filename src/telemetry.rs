//! The names of all metrics, in one place.

/// Items that the queue dropped before they cost a forward, by `reason`: `cancelled` or `late`.
pub const ITEMS_DROPPED: &str = "spatialscore_items_dropped_total";
/// Items that hold a place in the queue, those still being prepared included.
pub const QUEUE_ITEMS: &str = "spatialscore_queue_items";
/// Tokens of those items.
pub const QUEUE_TOKENS: &str = "spatialscore_queue_tokens";
/// Seconds from an item's admission to the start of its forward.
pub const QUEUE_WAIT: &str = "spatialscore_queue_wait_seconds";
/// Seconds of a forward.
pub const FORWARD: &str = "spatialscore_forward_seconds";
/// Items of a batch.
pub const BATCH_ITEMS: &str = "spatialscore_batch_items";
/// Tokens of a batch.
pub const BATCH_TOKENS: &str = "spatialscore_batch_tokens";
/// Forwards that failed and were tried again with fewer items.
pub const FORWARD_FAILURES: &str = "spatialscore_forward_failures_total";
