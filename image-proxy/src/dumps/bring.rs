//! Decisions that the target has not heard when its link ended. Each is brought again and again, as long as image-proxy
//! runs: what stands restored and held on the target waits for nothing else.

use std::sync::Arc;
use std::time::Duration;

use image_common::error_chain::chain;
use image_common::tasks;
use tokio_util::sync::CancellationToken;

use crate::dumps::late::Late;
use crate::dumps::proxy::{Active, Doubt, Proxy};
use crate::link::decision::{Address, Decision};
use crate::session::phase::Ended;
use crate::session::run::{Run, Told};

/// Between two attempts, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A commit that is being concluded. image-proxy does not stop before that.
pub struct Concluding(Arc<Proxy>);

impl Drop for Concluding {
    fn drop(&mut self) {
        self.0.registry().concluding -= 1;
        self.0.changed();
    }
}

impl Proxy {
    /// A script is being told; what becomes of its process decides about the set, also when the link is gone.
    pub fn concludes(self: &Arc<Self>) -> Concluding {
        self.registry().concluding += 1;
        Concluding(self.clone())
    }

    /// CRIU has killed what this run dumped. If the run has ended in doubt before that was seen, the target is to hear it.
    pub async fn killed(self: &Arc<Self>, active: &Active) {
        let Active { run, session } = active;
        self.over(run).await;
        if matches!(run.state().ended(), Some(Ended::InDoubt(_))) {
            let decided = Some((active.clone(), Decision::Commit));
            self.close_decided(&mut self.registry(), session.clone(), None, decided);
        }
    }

    /// Has the target hear what became of the process of a dump, whose link is gone. Until then the dump is in doubt.
    /// Nothing is done if the cache of the session takes no decision without the session's link.
    pub(super) fn bring(self: &Arc<Self>, active: &Active, decision: Decision) {
        let Some(address) = active.session.address().cloned() else {
            return;
        };
        let late = Late {
            decision,
            why: None,
            over: CancellationToken::new(),
        };
        {
            let mut registry = self.registry();
            let mut doubts = registry.doubts.iter_mut();
            match doubts.find(|d| Arc::ptr_eq(&d.active.run, &active.run)) {
                Some(doubt) if doubt.late.is_some() => return,
                Some(doubt) => doubt.late = Some(late.clone()),
                None => {
                    let doubt = Doubt {
                        active: active.clone(),
                        told: Told::default(),
                        late: Some(late.clone()),
                    };
                    self.add_doubt(&mut registry, doubt);
                }
            }
        }
        self.changed();
        let (proxy, failed) = (self.clone(), self.clone());
        let (bringing, run) = (active.clone(), active.run.clone());
        let task = async move { proxy.bring_until_heard(&bringing, &address, &late).await };
        tasks::spawn("bringing a decision", task, move |_| failed.not_late(&run));
    }

    async fn bring_until_heard(&self, active: &Active, address: &Address, late: &Late) {
        let Active { run, session } = active;
        let (name, snapshot, process) = (&session.name, &run.snapshot, late.process());
        let stop = &self.shutdown.requested;
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        loop {
            let last = stop.is_cancelled();
            let brought = tokio::select! {
                biased;
                () = late.over.cancelled() => return,
                brought = address.bring(run.set, &late.decision) => brought,
            };
            let Err(why) = brought else {
                tracing::warn!(session = %name, %snapshot, "not in doubt any more: the target has heard that {process}");
                return self.forget(run);
            };
            let why = chain(&why);
            if said.as_ref() != Some(&why) {
                tracing::warn!(
                    session = %name, %snapshot,
                    "the target does not know yet that {process}: {why}; image-proxy tries again until it has heard"
                );
                self.tried(run, &why);
                said = Some(why);
            }
            if last {
                self.not_brought(active, late);
                return self.forget(run);
            }
            tokio::select! {
                () = late.over.cancelled() => return,
                // At once, and for the last time.
                () = stop.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn tried(&self, run: &Arc<Run>, why: &str) {
        let mut registry = self.registry();
        let own = |d: &&mut Doubt| Arc::ptr_eq(&d.active.run, run);
        let late = registry.doubts.iter_mut().find(own);
        if let Some(late) = late.and_then(|d| d.late.as_mut()) {
            late.why = Some(why.to_owned());
        }
    }

    /// From here on the operator decides, on the target.
    fn not_brought(&self, active: &Active, late: &Late) {
        let Active { run, session } = active;
        let command = late.command(&session.handle());
        tracing::error!(
            session = %session.name, snapshot = %run.snapshot,
            "image-proxy stops, and the target has not heard that {}: run `{command}` there",
            late.process()
        );
        self.registry().unheard = true;
    }

    /// At the end of image-proxy: no decision is brought any more.
    pub fn leave_decisions(&self) {
        let doubts = std::mem::take(&mut self.registry().doubts);
        for doubt in doubts {
            if let Some(late) = &doubt.late {
                late.over.cancel();
                self.not_brought(&doubt.active, late);
            }
        }
    }

    /// What is to be done for it is done, or not to be done.
    pub(super) fn forget(&self, run: &Arc<Run>) {
        let mut registry = self.registry();
        registry.doubts.retain(|d| !Arc::ptr_eq(&d.active.run, run));
        drop(registry);
        self.changed();
    }

    /// The task that brought it is gone: it is in doubt as without.
    fn not_late(&self, run: &Arc<Run>) {
        let mut registry = self.registry();
        let own = |d: &&mut Doubt| Arc::ptr_eq(&d.active.run, run);
        if let Some(doubt) = registry.doubts.iter_mut().find(own) {
            doubt.late = None;
        }
        drop(registry);
        self.changed();
    }
}
