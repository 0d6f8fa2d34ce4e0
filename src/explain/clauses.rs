//! A prompt with a part of it left out, or turned round. By words of English: a prompt in another language has no clause
//! and no relation here.

use std::ops::Range;

/// A clause, and what is left of the prompt without it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// The clause.
    pub text: String,
    /// The prompt without it.
    pub without: String,
}

/// A relation turned round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turned {
    /// As it stands in the prompt.
    pub from: String,
    /// As it stands in the other.
    pub to: String,
    /// The other prompt.
    pub prompt: String,
}

/// What stands between two clauses. A comma or an "and" alone may stand between two things of one.
const BETWEEN: [&str; 11] =
    [". ", "; ", "! ", "? ", "\n", ", and ", ", while ", ", whereas ", ", but ", ", with ", ", where "];

/// Relations and what they are turned round to, longer ones before those that they begin with.
const OPPOSITES: [(&str, &str); 34] = [
    ("on top of", "underneath"),
    ("in front of", "behind"),
    ("from the front", "from behind"),
    ("from behind", "from the front"),
    ("closer to", "farther from"),
    ("farther from", "closer to"),
    ("further from", "closer to"),
    ("larger than", "smaller than"),
    ("bigger than", "smaller than"),
    ("smaller than", "larger than"),
    ("far from", "near"),
    ("next to", "far from"),
    ("close to", "far from"),
    ("leftmost", "rightmost"),
    ("rightmost", "leftmost"),
    ("underneath", "on top of"),
    ("beneath", "above"),
    ("outside", "inside"),
    ("inside", "outside"),
    ("behind", "in front of"),
    ("bottom", "top"),
    ("higher", "lower"),
    ("upper", "lower"),
    ("above", "below"),
    ("below", "above"),
    ("under", "over"),
    ("right", "left"),
    ("lower", "higher"),
    ("left", "right"),
    ("over", "under"),
    ("near", "far from"),
    ("top", "bottom"),
    ("beside", "far from"),
    ("within", "outside"),
];

/// The clauses of a prompt, where there are several.
pub fn clauses(prompt: &str) -> Vec<Clause> {
    let prompt = prompt.trim();
    let parts = parts(prompt);
    if parts.len() < 2 {
        return Vec::new();
    }
    let end = prompt.chars().last().filter(|last| matches!(last, '.' | '!' | '?'));
    let clause = |left_out: usize| {
        let mut without = String::new();
        for (index, (between, part)) in parts.iter().enumerate() {
            if index != left_out {
                without += if without.is_empty() { "" } else { between };
                without += part;
            }
        }
        if let Some(end) = end.filter(|&end| !without.ends_with(end)) {
            without.push(end);
        }
        Clause { text: parts[left_out].1.trim_end_matches(['.', '!', '?']).to_owned(), without }
    };
    (0..parts.len()).map(clause).collect()
}

/// The parts of a prompt, each with what stands before it.
fn parts(prompt: &str) -> Vec<(&str, &str)> {
    let (mut parts, mut before, mut rest) = (Vec::new(), "", prompt);
    loop {
        let found = BETWEEN.iter().filter_map(|between| Some((rest.find(between)?, *between)));
        // The leftmost, and the longest of those that begin there.
        let next = found.min_by_key(|&(at, between)| (at, std::cmp::Reverse(between.len())));
        let (part, behind) = match next {
            Some((at, between)) => (&rest[..at], Some((between, &rest[at + between.len()..]))),
            None => (rest, None),
        };
        if !part.trim().is_empty() {
            parts.push((before, part.trim()));
        }
        let Some((between, behind)) = behind else { return parts };
        (before, rest) = (between, behind);
    }
}

/// The prompt with each of its relations turned round, one at a time.
pub fn turned(prompt: &str) -> Vec<Turned> {
    let turn = |(Range { start, end }, to): (Range<usize>, &str)| {
        let from = &prompt[start..end];
        let capital = from.chars().next().is_some_and(char::is_uppercase);
        let mut to = to.to_owned();
        if capital && let Some(first) = to.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        let other = format!("{}{to}{}", &prompt[..start], &prompt[end..]);
        Turned { from: from.to_owned(), to, prompt: other }
    };
    relations(prompt).into_iter().map(turn).collect()
}

/// Where relations stand, and what each is turned round to.
fn relations(prompt: &str) -> Vec<(Range<usize>, &'static str)> {
    // As long as the prompt, byte by byte.
    let lower = prompt.to_ascii_lowercase();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(rest) = lower.get(at..).filter(|rest| !rest.is_empty()) {
        let begins = !lower[..at].ends_with(is_word);
        let here = OPPOSITES.iter().find(|(from, _)| {
            begins && rest.strip_prefix(from).is_some_and(|behind| !behind.starts_with(is_word))
        });
        match here {
            Some(&(from, to)) => {
                found.push((at..at + from.len(), to));
                at += from.len();
            }
            None => at += rest.chars().next().map_or(1, char::len_utf8),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(prompt: &str) -> Vec<(String, String)> {
        clauses(prompt).into_iter().map(|clause| (clause.text, clause.without)).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|&(a, b)| (a.to_owned(), b.to_owned())).collect()
    }

    #[test]
    fn each_clause_is_left_out_once() {
        assert_eq!(
            without("To the left of a sunflower there is a bathtub, and the sunflower stands higher up."),
            pairs(&[
                ("To the left of a sunflower there is a bathtub", "the sunflower stands higher up."),
                ("the sunflower stands higher up", "To the left of a sunflower there is a bathtub."),
            ])
        );
        assert_eq!(
            without("A cat. A dog is under it; a bird sings, while it rains"),
            pairs(&[
                ("A cat", "A dog is under it; a bird sings, while it rains"),
                ("A dog is under it", "A cat; a bird sings, while it rains"),
                ("a bird sings", "A cat. A dog is under it, while it rains"),
                ("it rains", "A cat. A dog is under it; a bird sings"),
            ])
        );
        for one in ["", " ", "a red, round ball and a cube", "a cup left of a plate.", "…", "左边。右边"]
        {
            assert_eq!(clauses(one), [], "{one:?}");
        }
    }

    #[test]
    fn each_relation_is_turned_round_alone() {
        let of = |prompt: &str| turned(prompt).into_iter().map(|turned| turned.prompt).collect::<Vec<_>>();
        assert_eq!(
            of("Left of a cup is a plate, in front of the upper shelf"),
            [
                "Right of a cup is a plate, in front of the upper shelf",
                "Left of a cup is a plate, behind the upper shelf",
                "Left of a cup is a plate, in front of the lower shelf",
            ]
        );
        assert_eq!(of("ein Würfel links vom Ball; brightly leftover, left-handed, overlaps"), [""; 0]);
        let [one] = &turned("an apple overlaps a car from the front")[..] else { panic!() };
        assert_eq!((&*one.from, &*one.to), ("from the front", "from behind"));
        assert_eq!(of("ÄÖ left"), ["ÄÖ right"]);
    }

    /// Nothing is both a relation and the beginning of one that stands behind it.
    #[test]
    fn longer_relations_come_before_what_they_begin_with() {
        for (index, (first, _)) in OPPOSITES.iter().enumerate() {
            let hidden =
                OPPOSITES[index + 1..].iter().find(|(later, _)| later.starts_with(&format!("{first} ")));
            assert_eq!(hidden, None, "{first}");
        }
    }
}
