//! Steps that few requests take.

use std::pin::Pin;

/// A step that few requests take, in a box, and in code of its own.
///
/// A call of the AWS SDK needs 12 KB of the stack where it is made and polled. In a function that the compiler merges with others,
/// all of that would be part of the stack of every request.
#[cold]
#[inline(never)]
pub fn aside<'s, F>(
    step: impl FnOnce() -> F,
) -> Pin<Box<dyn Future<Output = F::Output> + Send + 's>>
where
    F: Future + Send + 's,
{
    Box::pin(step())
}
