//! The paths of the HTTP edge, which the layers here tell apart as they do the methods of gRPC.

/// Whether the server serves.
pub const HEALTH: &str = "/health";
/// What UniRL may ask to be scored by.
pub const REWARDS: &str = "/rewards";
/// UniRL's scoring.
pub const SCORE: &str = "/score";
/// Flow-Factory's scoring.
pub const COMPUTE: &str = "/compute";
/// All there are.
pub const ALL: [&str; 4] = [HEALTH, REWARDS, SCORE, COMPUTE];
