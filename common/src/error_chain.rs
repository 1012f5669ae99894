//! How an error becomes text.

/// An error and its causes in one line, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Transparent errors repeat what their parent already said.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("cannot read {0}")]
        File(&'static str, #[source] std::io::Error),
        #[error(transparent)]
        Inner(#[from] std::io::Error),
    }

    #[test]
    fn each_cause_is_said_once() {
        let denied = || std::io::Error::other("denied");
        assert_eq!(
            chain(&Failure::File("x", denied())),
            "cannot read x: denied"
        );
        assert_eq!(chain(&Failure::Inner(denied())), "denied");
    }
}
