//! What a peer can do beyond the first version's messages.

use serde::{Deserialize, Serialize};

/// A capability beyond the first version's messages. It is used only with a peer that announced it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// Understands bodies in parts: `more` and `body_part`.
    BodyParts,
    /// Understands `cancel`.
    Cancel,
    /// Understands `replaced` and `url_updated`.
    Notices,
    /// Sends no part of a body before `window` allows it, and sends `window` for the bodies it receives.
    Window,
    /// Repeats the `reply_to` of a request in every message about it.
    ReplyTo,
    /// Understands compressed bodies; see [`super::Encoding`].
    Zstd,
    /// Enforces the visitor policy in `access` of `ready`. Has no meaning when an agent announces it.
    Access,
    /// Answers a `ping` of a connection that does not serve its tunnel with `replaced`, so that an agent can ask whether it was
    /// really replaced. Has no meaning when an agent announces it.
    ConfirmReplaced,
    /// Carries upgraded connections, such as WebSockets: `upgrade` of `http_request`, and raw bytes in the parts that follow.
    Upgrade,
    /// Reads messages with a body in binary; see [`super::Format`].
    Binary,
    /// Carries visitors' WebSockets as text messages: `websocket` of `http_request`, and the `websocket_` messages that follow.
    Websockets,
    /// Repeats the `id` of a `ping` in its answer. Has no meaning when an agent announces it.
    PingIds,
    /// Reads binary messages that come whole in one frame. An agent says so in its handshake, too: see
    /// [`crate::headers::LONG_FRAMES`].
    LongFrames,
    /// Reads binary messages with compact heads; see [`super::Heads`].
    CompactHeads,
    /// A feature that this code does not know.
    #[serde(other)]
    Unknown,
}

/// What this code announces, on both sides.
pub const FEATURES: [Feature; 14] = [
    Feature::BodyParts,
    Feature::Cancel,
    Feature::Notices,
    Feature::Window,
    Feature::ReplyTo,
    Feature::Zstd,
    Feature::Access,
    Feature::ConfirmReplaced,
    Feature::Upgrade,
    Feature::Binary,
    Feature::Websockets,
    Feature::PingIds,
    Feature::LongFrames,
    Feature::CompactHeads,
];
