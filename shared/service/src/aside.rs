//! Steps that most requests do without.

use std::pin::Pin;

/// Boxes a step that most requests of `tunnel-local` do without. It is made and polled outside the code of its caller.
///
/// A call of the AWS SDK needs 12 KB of the stack where it is made and polled. In a function that the compiler merges with others,
/// all of that would be part of the stack of every request.
#[inline(never)]
pub fn aside<'s, F>(
    step: impl FnOnce() -> F,
) -> Pin<Box<dyn Future<Output = F::Output> + Send + 's>>
where
    F: Future + Send + 's,
{
    Box::pin(step())
}
