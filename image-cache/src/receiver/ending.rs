//! A session that ends with the task that serves it, however that ends: one that panicked would
//! leave its session connected for ever, with its name taken and its images never judged.

use std::ops::Deref;
use std::sync::Arc;

use crate::store::session::Session;
use crate::store::Store;

pub struct Ending {
    store: Arc<Store>,
    session: Arc<Session>,
    ended: bool,
}

impl Ending {
    pub fn new(store: &Arc<Store>, session: Arc<Session>) -> Self {
        Self {
            store: store.clone(),
            session,
            ended: false,
        }
    }

    pub fn end(mut self, reason: &str) {
        self.ended = true;
        self.store.disconnect(&self.session, reason);
    }
}

impl Deref for Ending {
    type Target = Arc<Session>;

    fn deref(&self) -> &Arc<Session> {
        &self.session
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.ended {
            tracing::error!(session = %self.session.name, "image-cache has an error of its own; the session ends");
            let reason = "image-cache had an error of its own";
            self.store.disconnect(&self.session, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Policy, Scope};

    #[tokio::test]
    async fn a_panic_ends_the_session() {
        let store = Store::new(1 << 20, Policy::default());
        let open = || store.open_session("web".parse().unwrap(), 1, "10.0.0.1:5".into());
        let session = Ending::new(&store, open().unwrap());
        let serving = tokio::spawn(async move {
            let session = session;
            assert!(session.is_connected());
            panic!("on purpose, for session {}", session.name);
        });
        assert!(serving.await.unwrap_err().is_panic());
        assert!(store.newest(&Scope::Any).is_empty(), "it holds nothing");
    }

    #[tokio::test]
    async fn an_end_is_told_once() {
        let store = Store::new(1 << 20, Policy::default());
        let opened = store.open_session("web".parse().unwrap(), 1, "10.0.0.1:5".into());
        let session = Ending::new(&store, opened.unwrap());
        let kept = session.clone();
        session.end("the source ended the session");
        let reason = kept.aborted().unwrap();
        assert_eq!(reason, "the source ended the session");
    }
}
