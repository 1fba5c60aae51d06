//! What the loom tests share.

use std::sync::Arc;

use loom::thread;

/// Runs `a` and `b` in two threads, in every interleaving with up to `preemptions` switches where none is needed, and
/// checks each outcome.
///
/// The model checker looks for conflicts with the last access to a word only. It so misses that a load of one thread
/// may come after a store of another that has just loaded the same word, unless the other goes first. Hence both
/// take their turn at that.
pub fn race<S, A, B>(preemptions: usize, setup: fn() -> S, a: fn(&S) -> A, b: fn(&S) -> B, check: fn(&S, A, B))
where
    S: Send + Sync + 'static,
    A: Send + 'static,
    B: Send + 'static,
{
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let state = Arc::new(setup());
        let other = Arc::clone(&state);
        let thread = thread::spawn(move || b(&other));
        let from_a = a(&state);
        let from_b = thread.join().unwrap();
        check(&state, from_a, from_b);
    });
    model.check(move || {
        let state = Arc::new(setup());
        let other = Arc::clone(&state);
        let thread = thread::spawn(move || a(&other));
        let from_b = b(&state);
        let from_a = thread.join().unwrap();
        check(&state, from_a, from_b);
    });
}
