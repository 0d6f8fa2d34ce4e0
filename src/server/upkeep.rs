//! What is done for the models while they serve.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::engine::ModelControl;
use crate::scheduler::worker::BACKOFF;

/// Has the models tested again and again.
pub(super) async fn test_again(
    manager: Arc<impl ModelControl + 'static>,
    interval: Option<Duration>,
) -> Infallible {
    let Some(interval) = interval else { return std::future::pending().await };
    loop {
        tokio::time::sleep(interval).await;
        let manager = Arc::clone(&manager);
        if tokio::task::spawn_blocking(move || manager.test_again()).await.is_err() {
            tracing::error!("the self-test panicked");
        }
    }
}

/// Brings back what a worker that was lost could not make anew, for as long as it takes.
pub(super) async fn restore(
    manager: Arc<impl ModelControl + 'static>,
    mut up: watch::Receiver<usize>,
) -> Infallible {
    let mut wait = Duration::MAX;
    loop {
        // Its sender is the manager's.
        let _ = timeout(wait, up.changed()).await;
        let manager = Arc::clone(&manager);
        let missing = tokio::task::spawn_blocking(move || manager.restore()).await.unwrap_or(true);
        wait = match missing {
            false => Duration::MAX,
            true if wait == Duration::MAX => BACKOFF[0],
            true => (wait * 2).min(BACKOFF[1]),
        };
    }
}
