//! What a Linux kernel says when it dies. Also a module of xtask: the outer machine's kernel is
//! read there, those of inner machines here.

/// How a kernel begins to say that it has a fault.
const SIGNS: &[&str] = &[
    "BUG: ",
    "kernel BUG at ",
    "Oops: ",
    "general protection fault",
    "Kernel panic - not syncing",
    "blocked for more than",
    "detected stall",
];
/// More than an oops and the panic that follows it have.
const LONGEST: usize = 80;

/// The lines from the first sign of a fault on.
pub fn last_words<'a, 'b>(lines: &'a [&'b str]) -> Option<&'a [&'b str]> {
    let is_sign = |line: &&str| SIGNS.iter().any(|sign| line.contains(sign));
    let words = &lines[lines.iter().position(is_sign)?..];
    Some(&words[..words.len().min(LONGEST)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_begin_with_the_first_sign() {
        let log = [
            "a",
            "[ 1.0] BUG: unable to handle page fault",
            "Kernel panic - not syncing: x",
            "b",
        ];
        assert_eq!(last_words(&log), Some(&log[1..]));
        assert_eq!(last_words(&["a", "b"]), None);
        let long = ["Oops: 0002 [#1] SMP"; LONGEST + 1];
        assert_eq!(last_words(&long).map(<[_]>::len), Some(LONGEST));
    }
}
