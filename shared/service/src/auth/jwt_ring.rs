//! What `jsonwebtoken` asks of a cryptography library, done by ring, which TLS brings along: no second one has to be trusted.

use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind, EncodingKey,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::{Error, ErrorKind},
    signature::{self, Verifier},
};
use ring::{
    hmac,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
        RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
        RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents,
        UnparsedPublicKey, VerificationAlgorithm,
    },
};

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// Lets `jsonwebtoken` use ring from now on, in the whole process.
pub(crate) fn install() {
    // Already installed by an earlier call: it is the same one.
    let _ = PROVIDER.install_default();
}

/// A key for one algorithm.
struct Key {
    algorithm: Algorithm,
    material: Material,
}

enum Material {
    Hmac(hmac::Key),
    Rsa {
        parameters: &'static RsaParameters,
        key: RsaPublicKeyComponents<Vec<u8>>,
    },
    Point {
        algorithm: &'static dyn VerificationAlgorithm,
        bytes: Vec<u8>,
    },
}

fn no_signer(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    Err(ErrorKind::InvalidAlgorithm.into())
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    if key.family() != algorithm.family() {
        return Err(ErrorKind::InvalidAlgorithm.into());
    }
    let material = match algorithm {
        Algorithm::HS256 => {
            Material::Hmac(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?))
        }
        Algorithm::RS256 => rsa(&RSA_PKCS1_2048_8192_SHA256, key)?,
        Algorithm::RS384 => rsa(&RSA_PKCS1_2048_8192_SHA384, key)?,
        Algorithm::RS512 => rsa(&RSA_PKCS1_2048_8192_SHA512, key)?,
        Algorithm::PS256 => rsa(&RSA_PSS_2048_8192_SHA256, key)?,
        Algorithm::PS384 => rsa(&RSA_PSS_2048_8192_SHA384, key)?,
        Algorithm::PS512 => rsa(&RSA_PSS_2048_8192_SHA512, key)?,
        Algorithm::ES256 => Material::Point {
            algorithm: &ECDSA_P256_SHA256_FIXED,
            bytes: key.try_get_as_bytes()?.to_vec(),
        },
        Algorithm::ES384 => Material::Point {
            algorithm: &ECDSA_P384_SHA384_FIXED,
            bytes: key.try_get_as_bytes()?.to_vec(),
        },
        Algorithm::EdDSA => Material::Point {
            algorithm: &ED25519,
            bytes: key.try_get_as_bytes()?.to_vec(),
        },
        // HS384, HS512 and anything else: the service uses none of them.
        _ => return Err(ErrorKind::InvalidAlgorithm.into()),
    };
    Ok(Box::new(Key {
        algorithm: *algorithm,
        material,
    }))
}

fn rsa(parameters: &'static RsaParameters, key: &DecodingKey) -> Result<Material, Error> {
    match key.kind() {
        DecodingKeyKind::RsaModulusExponent { n, e } => Ok(Material::Rsa {
            parameters,
            key: RsaPublicKeyComponents {
                n: without_zeros(n),
                e: without_zeros(e),
            },
        }),
        DecodingKeyKind::SecretOrDer(_) => Err(ErrorKind::InvalidKeyFormat.into()),
    }
}

/// Some issuers write a zero in front of a number, which ring does not take.
fn without_zeros(number: &[u8]) -> Vec<u8> {
    number
        .iter()
        .copied()
        .skip_while(|byte| *byte == 0)
        .collect()
}

impl Verifier<Vec<u8>> for Key {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let outcome = match &self.material {
            Material::Hmac(key) => hmac::verify(key, message, signature),
            Material::Rsa { parameters, key } => key.verify(parameters, message, signature),
            Material::Point { algorithm, bytes } => {
                UnparsedPublicKey::new(*algorithm, bytes).verify(message, signature)
            }
        };
        outcome.map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for Key {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
