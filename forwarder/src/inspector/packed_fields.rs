//! Header fields in one piece of memory: most are never looked at again, and are kept and dropped at the price of one allocation.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Header fields as they are kept.
///
/// Each is the lengths of its name and its value, 2 and 4 bytes, and then the two.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct PackedFields(Box<[u8]>);

/// The lengths before a field.
const LENGTHS: usize = 6;

impl PackedFields {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let sizes = headers
            .iter()
            .map(|(name, value)| LENGTHS + name.as_str().len() + value.len());
        let mut packed = Vec::with_capacity(sizes.sum());
        for (name, value) in headers {
            let name = name.as_str().as_bytes();
            // A name is shorter than 64 KiB (http::HeaderName), and no value is longer than a message.
            let name_length = u16::try_from(name.len()).unwrap_or_default();
            let value_length = u32::try_from(value.len()).unwrap_or_default();
            packed.extend_from_slice(&name_length.to_be_bytes());
            packed.extend_from_slice(&value_length.to_be_bytes());
            packed.extend_from_slice(&name[..usize::from(name_length)]);
            packed.extend_from_slice(&value.as_bytes()[..value_length as usize]);
        }
        Self(packed.into())
    }

    /// The fields to work with.
    pub(crate) fn unpack(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in self.iter() {
            let name = HeaderName::from_bytes(name);
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
                headers.append(name, value);
            }
        }
        headers
    }

    /// The last value of a field.
    pub(crate) fn last(&self, name: &HeaderName) -> Option<HeaderValue> {
        let name = name.as_str().as_bytes();
        let (_, value) = self.iter().filter(|field| field.0 == name).last()?;
        HeaderValue::from_bytes(value).ok()
    }

    /// How much memory they take.
    pub(crate) fn bytes(&self) -> usize {
        self.0.len()
    }

    fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let ([n0, n1, v0, v1, v2, v3], after) = rest.split_first_chunk::<LENGTHS>()?;
            let name_length = usize::from(u16::from_be_bytes([*n0, *n1]));
            let value_length = u32::from_be_bytes([*v0, *v1, *v2, *v3]) as usize;
            let (name, after) = after.split_at_checked(name_length)?;
            let (value, after) = after.split_at_checked(value_length)?;
            rest = after;
            Some((name, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_as_they_were() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("content-type", &b"text/plain"[..]),
            ("set-cookie", b"a=1"),
            ("x-empty", b""),
            ("set-cookie", b"b=2"),
            ("x-latin", b"caf\xe9"),
            ("x-long", &[b'x'; 70_000]),
        ] {
            let name = HeaderName::from_static(name);
            headers.append(name, HeaderValue::from_bytes(value).expect("a value"));
        }
        let packed = PackedFields::of(&headers);
        assert_eq!(packed.unpack(), headers);
        let last = packed.last(&http::header::SET_COOKIE);
        assert_eq!(last.as_ref().map(HeaderValue::as_bytes), Some(&b"b=2"[..]));
        assert_eq!(packed.last(&http::header::COOKIE), None);
        assert_eq!(
            PackedFields::of(&HeaderMap::new()).unpack(),
            HeaderMap::new()
        );
    }
}
