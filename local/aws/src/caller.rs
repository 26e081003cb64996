//! Who may call what this process serves on loopback: normally only the process itself.

use std::sync::Arc;

use http::{HeaderMap, header};

/// The access key that callers sign with. Only this process knows it, so its secret half need not be checked.
#[derive(Clone, Debug)]
pub struct AccessKey(Option<Arc<str>>);

impl AccessKey {
    /// A key that only those know whom it is given to.
    pub fn only(key: &str) -> Self {
        Self(Some(key.into()))
    }

    /// Any key is accepted: for sample data.
    pub fn any() -> Self {
        Self(None)
    }

    /// Whether a request is signed with the key ("Signature Version 4" in the IAM user guide: `Credential=KEY/...`).
    pub fn is_signed_by(&self, headers: &HeaderMap) -> bool {
        let Some(key) = &self.0 else { return true };
        let signed = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let used = signed
            .and_then(|value| value.split_once("Credential="))
            .and_then(|(_, rest)| rest.split_once('/'));
        used.is_some_and(|(used, _)| used == &**key)
    }
}
