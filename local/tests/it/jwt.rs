//! Agents with JSON Web Tokens: which are believed, and until when.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use forwarder::{settings::Secret, tunnel::TunnelError};
use local::Options;
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet, time::advance};
use tunnel_local_aws::quotas::Quotas;
use tunnel_service::{
    auth::{AuthError, AuthMode, AuthSettings, Authenticator, jwt::JwtSettings, owner::Owner},
    aws::sdk,
    now,
    settings::Variables,
};

use crate::harness::{Agent, Origin, get, settings, stack_with};

const ISSUER: &str = "https://issuer.example.com";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// The public half of an RSA key that nobody has any more, and what it signed: good until the year 2100.
const MODULUS: &str = "oAlKuWItrx2EGn4GBx5bCihotHfgmvM_X5f7kB6j_FF4fVu-wrkotZh7ILNb-MgudzLjjh0MkY04fO1r_wDOX8wsUtdRwS869vYBWZtHIR3jRTVg6cF1I2NByFqyfmS6la5yurpr_K7anHoVOjVYMa7WXIhP568l-oMhuYpdz4ebUnH1x0Am27B7xVMqElo0O8zYXmj8yl5BwpoPsZ8VF_hBQbFP70Y17JNKeN1cTCqQJK6gvxRnFxb0D93eOgxGuXU0R5hGULbe_2uGN0VCeZYsrh9IMiAJJoQkajPrSjJhXdSK_fcFS1SRw0iYVAuwvAk9-Mr4IzIX654wEHo4Lw";
const BY_RSA: [&str; 2] = [
    "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSJ9.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlLmNvbSIsImF1ZCI6InR1bm5lbCIsInN1YiI6ImFsaWNlIiwiZXhwIjo0MTAyNDQ0ODAwfQ.AS3I2256wMR3U6El2DQ3pCoGHfwV_lCYB5p1rgFyRRsAW9X5CaWfGTU_7izLnSiKuGXHy19US1GRXCYV3BC0A0W7Ft969JvZhnbEFhy-yiQUbO7mr0FueDyHJEPttGyzHi2xCfPv331uvfRGFNr6Renr15kB07SNLNhXjL69QPjm6MhJpTrIp4nCmI7fg-QKMFTly0jYqi_bPjxVDtf2ucHqlrxulFsCGs0-AEZXjcR7mxxWu1GeKQjiaJ_QGPrA5cxV0MTQNyJg_g7VpNlxiZ425kSE2JaRMWcuIlm9lFMgO3ojZYRjPWkVCnj6JseCEsO-4RhVs5qTJ-Ap1SZG-g",
    "eyJhbGciOiJQUzI1NiIsImtpZCI6InJzYSJ9.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlLmNvbSIsImF1ZCI6InR1bm5lbCIsInN1YiI6ImFsaWNlIiwiZXhwIjo0MTAyNDQ0ODAwfQ.EZwh_HVM0qTJ4_kSfAW9XT0Aii4YlASjrHuew1Be4OOcOj-sW753iQ9WUwEtnwwgB1Hf8wccUajBCp0rSZwtBPR8C1IiYu6nzKdskrMUwXUrGxtaPVVwuprOcGFd508VsQEwddR1K7nqlxd8GBIyKO7FzXBT6kWrUnn81bH7vyNxPVw5YAYfDO0Ip1DcW57XLIo2eEgmji5usH7FdgBvsDh-DMgXPQ-v5yh-dRnhFNOSvu4ywvOHSvbpQ_9j6lzuL-jqXgo2QndZgZbFEoWceXgRxkdUcw-nIC3KzodT5KDt0kmk-SR5muxatKgZo9cyjqaPZL8NKDr3Ujh5oMze4g",
];

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn token(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let message = format!(
        "{}.{}",
        encoded(header.to_string()),
        encoded(claims.to_string())
    );
    let signature = sign(message.as_bytes());
    format!("{message}.{}", encoded(signature))
}

fn with_secret(secret: &str) -> impl Fn(&[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    move |message| hmac::sign(&key, message).as_ref().to_vec()
}

/// The claims of a good token, with some of them replaced; those that are null are left out.
fn claims(replaced: &Value) -> Value {
    let mut claims =
        json!({ "iss": ISSUER, "aud": "tunnel", "sub": "alice", "exp": now().as_secs() + 600 });
    let all = claims.as_object_mut().expect("an object");
    all.extend(replaced.as_object().expect("an object").clone());
    all.retain(|_, value| !value.is_null());
    claims
}

fn by_secret(replaced: &Value) -> String {
    token(
        &json!({ "alg": "HS256" }),
        &claims(replaced),
        with_secret(SECRET),
    )
}

fn access(jwt: &[(&str, &str)]) -> Result<Authenticator, String> {
    let settings: BTreeMap<&str, &str> = jwt
        .iter()
        .copied()
        .chain([("AUTH", "jwt"), ("TOKENS_TABLE", "tokens")])
        .collect();
    let variables = Variables::new(move |name| settings.get(name).map(|value| (*value).to_owned()));
    let settings = AuthSettings::read(&variables);
    let sdk = sdk::for_loopback("http://127.0.0.1:9", "nobody");
    variables
        .finish(|| Some(Authenticator::new(settings?, &sdk)))
        .map_err(|faults| faults.to_string())
}

fn access_by_secret() -> Authenticator {
    access(&[
        ("JWT_ISSUER", ISSUER),
        ("JWT_AUDIENCE", "tunnel"),
        ("JWT_SECRET", SECRET),
    ])
    .expect("settings")
}

/// The header fields of a caller with this token.
fn with(token: &str) -> HeaderMap {
    let value = HeaderValue::from_str(&format!("Bearer {token}")).expect("a value");
    HeaderMap::from_iter([(header::AUTHORIZATION, value)])
}

async fn owner(access: &Authenticator, token: &str) -> Option<Owner> {
    access
        .identify(&with(token), now())
        .await
        .expect("an answer")
        .map(|identity| identity.owner)
}

#[tokio::test]
async fn a_valid_token_identifies_its_owner_by_subject() {
    let access = access_by_secret();
    let alice = owner(&access, &by_secret(&json!({})))
        .await
        .expect("an owner");
    assert!(matches!(alice, Owner::Jwt(_)), "{alice}");
    assert_eq!(
        owner(&access, &by_secret(&json!({ "exp": now().as_secs() + 5 }))).await,
        Some(alice.clone())
    );
    assert_eq!(
        owner(&access, &by_secret(&json!({ "aud": ["other", "tunnel"] }))).await,
        Some(alice.clone())
    );
    assert_ne!(
        owner(&access, &by_secret(&json!({ "sub": "bob" }))).await,
        Some(alice)
    );

    let expires = access
        .identify(
            &with(&by_secret(&json!({ "exp": 4_102_444_800_u64 }))),
            now(),
        )
        .await
        .expect("an answer");
    assert_eq!(
        expires.and_then(|identity| identity.expires_at),
        Some(4_102_444_860),
        "with a minute for the clocks"
    );
}

#[tokio::test]
async fn an_invalid_token_identifies_no_one() {
    let (access, now) = (access_by_secret(), now().as_secs());
    for replaced in [
        json!({ "exp": null }),
        json!({ "exp": "never" }),
        json!({ "exp": -1 }),
        json!({ "exp": now - 90 }),
        json!({ "nbf": now + 90 }),
        json!({ "nbf": "later" }),
        json!({ "iss": null }),
        json!({ "iss": "https://issuer.example.com/" }),
        json!({ "iss": [ISSUER] }),
        json!({ "aud": null }),
        json!({ "aud": "other" }),
        json!({ "aud": [] }),
        json!({ "sub": null }),
        json!({ "sub": "" }),
    ] {
        assert_eq!(
            owner(&access, &by_secret(&replaced)).await,
            None,
            "{replaced}"
        );
    }
    for replaced in [json!({ "exp": now - 30 }), json!({ "nbf": now + 30 })] {
        assert!(
            owner(&access, &by_secret(&replaced)).await.is_some(),
            "clocks differ: {replaced}"
        );
    }
    let good = by_secret(&json!({}));
    let (message, _) = good.rsplit_once('.').expect("three parts");
    for spoilt in [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        message,
        &format!("{message}."),
        &good[1..],
        &"a".repeat(100_000),
        &format!("{good}.x"),
    ] {
        assert_eq!(owner(&access, spoilt).await, None, "{spoilt}");
    }
    assert_eq!(
        access
            .identify(&HeaderMap::new(), tunnel_service::now())
            .await
            .expect("an answer"),
        None
    );
}

#[tokio::test]
async fn the_token_does_not_choose_how_it_is_checked() {
    let access = access_by_secret();
    let good = claims(&json!({}));
    for header in [
        json!({ "alg": "none" }),
        json!({ "alg": "None" }),
        json!({ "alg": "HS384" }),
        json!({ "alg": "RS256" }),
        json!({ "alg": "ES256" }),
        json!({}),
        json!({ "alg": "HS256", "crit": ["b64"], "b64": false }),
    ] {
        assert_eq!(
            owner(&access, &token(&header, &good, with_secret(SECRET))).await,
            None,
            "{header}"
        );
        assert_eq!(
            owner(&access, &token(&header, &good, |_| Vec::new())).await,
            None,
            "{header} without signature"
        );
    }
    let other = with_secret("another secret of 32 or more bytes");
    assert_eq!(
        owner(&access, &token(&json!({ "alg": "HS256" }), &good, other)).await,
        None
    );
}

#[test]
fn settings_that_would_trust_too_much_are_refused() {
    let (issuer, audience) = (("JWT_ISSUER", ISSUER), ("JWT_AUDIENCE", "tunnel"));
    let (secret, url) = (
        ("JWT_SECRET", SECRET),
        ("JWT_JWKS_URL", "https://issuer.example.com/keys"),
    );
    for (settings, fault) in [
        (&[issuer, audience][..], "exactly one"),
        (&[issuer, audience, secret, url], "exactly one"),
        (
            &[
                issuer,
                audience,
                ("JWT_SECRET", "0123456789abcdef0123456789abcde"),
            ],
            "32 bytes",
        ),
        (
            &[
                issuer,
                audience,
                ("JWT_JWKS_URL", "http://issuer.example.com/keys"),
            ],
            "https://",
        ),
        (&[audience, secret], "JWT_ISSUER"),
        (&[issuer, secret], "JWT_AUDIENCE"),
    ] {
        let said = access(settings).expect_err("a fault");
        assert!(
            said.contains(fault) && !said.contains("0123456789"),
            "{said}"
        );
    }
    assert!(
        !format!(
            "{:?}",
            access(&[issuer, audience, secret]).expect("settings")
        )
        .contains("0123456789")
    );
    access(&[issuer, audience, url]).expect("settings");
}

/// An issuer that publishes keys.
struct Publisher {
    url: String,
    asked: Arc<AtomicUsize>,
    answer: Arc<Mutex<(StatusCode, Value)>>,
    _serving: JoinSet<()>,
}

impl Publisher {
    async fn of(keys: Value) -> Self {
        let (asked, answer) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(Mutex::new((StatusCode::OK, json!({ "keys": keys })))),
        );
        let (count, said) = (asked.clone(), answer.clone());
        let keys = axum::routing::get(async move || {
            count.fetch_add(1, Ordering::SeqCst);
            let (status, keys) = said.lock().expect("not poisoned").clone();
            (status, keys.to_string())
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/keys", listener.local_addr().expect("an address"));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            axum::serve(listener, axum::Router::new().route("/keys", keys))
                .await
                .expect("served");
        });
        Self {
            url,
            asked,
            answer,
            _serving: serving,
        }
    }

    fn access(&self) -> Authenticator {
        access(&[
            ("JWT_ISSUER", ISSUER),
            ("JWT_AUDIENCE", "tunnel"),
            ("JWT_JWKS_URL", &self.url),
        ])
        .expect("settings")
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn p256() -> (EcdsaKeyPair, Value) {
    let random = SystemRandom::new();
    let document =
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
    let pair =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random)
            .expect("a key");
    let point = pair.public_key().as_ref();
    let jwk = json!({ "kty": "EC", "crv": "P-256", "use": "sig", "kid": "ec", "x": encoded(&point[1..33]), "y": encoded(&point[33..]) });
    (pair, jwk)
}

/// A token with a signature of P-256.
fn by_ec(pair: &EcdsaKeyPair, header: &Value, claims: &Value) -> String {
    token(header, claims, |message| {
        let signature = pair.sign(&SystemRandom::new(), message).expect("signed");
        signature.as_ref().to_vec()
    })
}

/// A publisher of a key of each kind, and of one of a kind that is not known; and those that sign.
struct Keys {
    publisher: Publisher,
    ec: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

impl Keys {
    async fn published() -> Self {
        let (ec, ec_jwk) = p256();
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        let ed = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
        let ed_jwk = json!({ "kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": encoded(ed.public_key().as_ref()) });
        let rsa = json!({ "kty": "RSA", "alg": null, "kid": "rsa", "n": MODULUS, "e": "AQAB" });
        let strange = json!({ "kty": "POST-QUANTUM", "kid": "strange" });
        let publisher = Publisher::of(json!([strange, ec_jwk, ed_jwk, rsa])).await;
        Self { publisher, ec, ed }
    }
}

#[tokio::test]
async fn tokens_signed_with_published_keys_are_believed_and_the_keys_are_fetched_once() {
    let keys = Keys::published().await;
    let access = keys.publisher.access();
    let alice = owner(&access_by_secret(), &by_secret(&json!({}))).await;
    assert!(alice.is_some(), "a token signed with the secret");

    let good = claims(&json!({}));
    let by_ec = by_ec(&keys.ec, &json!({ "alg": "ES256", "kid": "ec" }), &good);
    let by_ed = token(&json!({ "alg": "EdDSA", "kid": "ed" }), &good, |message| {
        keys.ed.sign(message).as_ref().to_vec()
    });
    for signed in [&by_ec, &by_ed]
        .into_iter()
        .map(String::as_str)
        .chain(BY_RSA)
    {
        assert_eq!(
            owner(&access, signed).await,
            alice,
            "an owner is issuer and subject: {signed}"
        );
    }
    assert_eq!(keys.publisher.asked(), 1, "within a minute");
}

#[tokio::test]
async fn a_key_that_is_published_no_longer_is_believed_for_an_hour_at_most() {
    let (pair, jwk) = p256();
    let publisher = Publisher::of(json!([jwk])).await;
    let _clock = stopped_clock();
    let access = publisher.access();
    let header = json!({ "alg": "ES256", "kid": "ec" });
    let token = by_ec(&pair, &header, &claims(&json!({})));
    assert!(owner(&access, &token).await.is_some());
    *publisher.answer.lock().expect("not poisoned") = (StatusCode::OK, json!({ "keys": [] }));
    for (minutes, is_believed) in [(59, true), (2, false)] {
        advance(Duration::from_secs(60 * minutes)).await;
        assert_eq!(owner(&access, &token).await.is_some(), is_believed);
    }
}

#[tokio::test]
async fn tokens_that_do_not_fit_the_published_keys_are_refused() {
    let keys = Keys::published().await;
    let access = keys.publisher.access();
    let good = claims(&json!({}));
    let by_ec = |header: &Value, claims: &Value| by_ec(&keys.ec, header, claims);
    // The public key as if it were a secret, a key for another algorithm, and no key at all.
    let point = keys.ec.public_key().as_ref().to_vec();
    let confused = token(&json!({ "alg": "HS256", "kid": "ec" }), &good, |message| {
        hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &point), message)
            .as_ref()
            .to_vec()
    });
    for wrong in [
        confused,
        by_ec(&json!({ "alg": "ES256", "kid": "ed" }), &good),
        by_ec(&json!({ "alg": "ES256", "kid": "rsa" }), &good),
        by_ec(&json!({ "alg": "ES384", "kid": "ec" }), &good),
        by_ec(&json!({ "alg": "none", "kid": "ec" }), &good),
        by_ec(&json!({ "alg": "ES256" }), &good),
        by_ec(
            &json!({ "alg": "ES256", "kid": "ec" }),
            &claims(&json!({ "aud": "other" })),
        ),
        by_secret(&json!({})),
        format!(
            "{}.{}",
            BY_RSA[1].rsplit_once('.').expect("three parts").0,
            BY_RSA[0].rsplit_once('.').expect("three parts").1
        ),
    ] {
        assert_eq!(owner(&access, &wrong).await, None, "{wrong}");
    }
    assert_eq!(keys.publisher.asked(), 1, "within a minute");
}

#[tokio::test]
async fn the_only_published_key_needs_no_name() {
    let (pair, jwk) = p256();
    let only = Publisher::of(json!([jwk])).await;
    let unnamed = by_ec(&pair, &json!({ "alg": "ES256" }), &claims(&json!({})));
    assert!(owner(&only.access(), &unnamed).await.is_some());
}

#[tokio::test]
async fn keys_that_are_secret_or_not_for_signatures_are_not_used() {
    let (pair, mut jwk) = p256();
    let mint = || {
        by_ec(
            &pair,
            &json!({ "alg": "ES256", "kid": "ec" }),
            &claims(&json!({})),
        )
    };
    jwk["use"] = json!("enc");
    assert_eq!(
        owner(&Publisher::of(json!([jwk])).await.access(), &mint()).await,
        None
    );
    let oct = json!({ "kty": "oct", "kid": "oct", "k": encoded(SECRET) });
    let by_oct = token(
        &json!({ "alg": "HS256", "kid": "oct" }),
        &claims(&json!({})),
        with_secret(SECRET),
    );
    assert_eq!(
        owner(&Publisher::of(json!([oct])).await.access(), &by_oct).await,
        None
    );
}

#[tokio::test]
async fn a_key_that_was_published_a_moment_ago_is_not_known_yet_rather_than_wrong() {
    let (pair, mut jwk) = p256();
    let by = |kid: &str| {
        by_ec(
            &pair,
            &json!({ "alg": "ES256", "kid": kid }),
            &claims(&json!({})),
        )
    };
    let publisher = Publisher::of(json!([jwk.clone()])).await;
    let access = publisher.access();
    assert_eq!(
        owner(&access, &by("unknown")).await,
        None,
        "the keys were fetched for it: there is no such key"
    );
    jwk["kid"] = json!("rotated");
    let keys = json!({ "keys": [jwk] }).to_string();
    publisher.answer.lock().expect("not poisoned").1 = serde_json::from_str(&keys).expect("JSON");
    assert!(matches!(
        access.identify(&with(&by("rotated")), now()).await,
        Err(AuthError::Keys(_))
    ));
    assert_eq!(publisher.asked(), 1, "within a minute");
}

#[tokio::test]
async fn while_keys_cannot_be_fetched_no_token_is_reported_as_invalid() {
    let (pair, jwk) = p256();
    let publisher = Publisher::of(json!([jwk])).await;
    let _clock = stopped_clock();
    let answer = publisher.answer.lock().expect("not poisoned").clone();
    for broken in [
        (StatusCode::INTERNAL_SERVER_ERROR, answer.1.clone()),
        (StatusCode::OK, json!("no set")),
    ] {
        *publisher.answer.lock().expect("not poisoned") = broken;
        let access = publisher.access();
        let good = by_ec(
            &pair,
            &json!({ "alg": "ES256", "kid": "ec" }),
            &claims(&json!({})),
        );
        let before = publisher.asked();
        for _ in 0..3 {
            assert!(matches!(
                access.identify(&with(&good), now()).await,
                Err(AuthError::Keys(_))
            ));
        }
        advance(Duration::from_millis(490)).await;
        assert!(matches!(
            access.identify(&with(&good), now()).await,
            Err(AuthError::Keys(_))
        ));
        assert_eq!(publisher.asked(), before + 1, "within half a second");
    }
}

/// Stops the clock of the runtime, so that time passes only with `advance`. It stands until what is returned is dropped.
fn stopped_clock() -> mpsc::Sender<()> {
    tokio::time::pause();
    let (hold, held) = mpsc::channel();
    // While such a task runs, a stopped clock does not jump to the next timer when the runtime is idle.
    tokio::task::spawn_blocking(move || held.recv());
    hold
}

#[tokio::test]
async fn keys_that_could_not_be_fetched_are_asked_for_again_after_a_second_and_then_less_often() {
    let (pair, jwk) = p256();
    let publisher = Publisher::of(json!([jwk])).await;
    let _clock = stopped_clock();
    let answer = publisher.answer.lock().expect("not poisoned").clone();
    let down = (StatusCode::INTERNAL_SERVER_ERROR, json!(null));
    *publisher.answer.lock().expect("not poisoned") = down.clone();
    let access = publisher.access();
    let header = json!({ "alg": "ES256", "kid": "ec" });
    let good = by_ec(&pair, &header, &claims(&json!({})));
    let ask = async || access.identify(&with(&good), now()).await;
    // A pause is at least half as long as it may be.
    for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
        let before = publisher.asked();
        assert!(matches!(ask().await, Err(AuthError::Keys(_))));
        assert_eq!(publisher.asked(), before + 1, "before {pause} s");
        advance(Duration::from_millis(pause * 490)).await;
        assert!(matches!(ask().await, Err(AuthError::Keys(_))));
        assert_eq!(publisher.asked(), before + 1, "in half of {pause} s");
        advance(Duration::from_millis(pause * 510)).await;
    }
    *publisher.answer.lock().expect("not poisoned") = answer;
    assert!(ask().await.is_ok());
    // What is known serves while the issuer is down again, and the pauses are short ones again.
    *publisher.answer.lock().expect("not poisoned") = down;
    advance(Duration::from_secs(60 * 60)).await;
    let before = publisher.asked();
    assert!(ask().await.is_ok());
    advance(Duration::from_secs(1)).await;
    assert!(ask().await.is_ok());
    assert_eq!(publisher.asked(), before + 2);
}

#[tokio::test]
async fn an_agent_with_a_json_web_token_is_an_owner_until_the_token_expires() {
    let issuer = JwtSettings {
        issuer: ISSUER.to_owned(),
        audience: "tunnel".to_owned(),
        jwks_url: String::new(),
        secret: SECRET.to_owned(),
    };
    let quotas = Quotas {
        recheck: Duration::from_millis(20),
        ..Quotas::default()
    };
    let stack = stack_with(Options {
        auth: AuthMode::Jwt,
        jwt: Some(issuer),
        quotas,
        ..Options::default()
    })
    .await;
    assert_eq!(stack.first_token, None);
    let origin = Origin::echo().await;
    let with = |token: String| forwarder::settings::Settings {
        token: Some(Secret::from(token)),
        ..settings(&stack, origin.address)
    };
    let agent = Agent::online(with(by_secret(&json!({})))).await;
    assert_eq!(get(&agent.url).await.status, StatusCode::OK);

    let bob = by_secret(&json!({ "sub": "bob" }));
    assert!(matches!(
        Agent::start(with(bob)).ended().await,
        Err(TunnelError::NameTaken(_))
    ));
    let stored = stack.create_token("stored").await.expect("a token");
    assert_eq!(
        Agent::start(with(stored)).ended().await,
        Err(TunnelError::Unauthorized)
    );

    agent.stop().await.expect("stopped as asked");
    // With the minute for the clocks it is good for two seconds more, or a little less.
    let mut brief = Agent::online(with(by_secret(&json!({ "exp": now().as_secs() - 58 })))).await;
    assert_eq!(brief.ended().await, Err(TunnelError::Unauthorized));
}
