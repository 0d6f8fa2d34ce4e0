//! Jinja as transformers runs it for chat templates: the constructs that templates use, with Python's values,
//! printed as Python prints them.
//!
//! Another Jinja that is only nearly the same gives other prompts, and so other scores, with no word said. So each
//! construct here gives what the reference gives, or is refused by name. Steps, bytes and depth are bounded: a
//! template comes with a checkpoint, and no checkpoint may hang a server.

mod filters;
mod formatting;
mod interpreter;
mod lexer;
mod methods;
mod operators;
mod parser;
mod predicates;
mod python_text;
mod syntax;
mod value;

use std::fmt;

pub(super) use self::value::Value;

use self::interpreter::Interpreter;
use self::syntax::Statement;

/// The longest template, in bytes. Those of the public models have up to 10 kB.
const MAX_SOURCE: usize = 1 << 20;

/// Why a template cannot be rendered: what it says that is wrong, or not supported here.
#[derive(Debug)]
pub(super) struct Refusal(String);

impl Refusal {
    /// Says on which line, unless the reason does.
    fn on_line(self, line: usize) -> Self {
        if self.0.starts_with("line ") { self } else { Self(format!("line {line}: {}", self.0)) }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

type Result<T> = std::result::Result<T, Refusal>;

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Refusal(reason.into()))
}

/// A template that has been read.
pub(super) struct Template(Vec<Statement>);

impl Template {
    /// Reads a template.
    pub fn parse(source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return refuse(format!("it has {} bytes; it may have {MAX_SOURCE}", source.len()));
        }
        parser::parse(source).map(Self)
    }

    /// Renders the template with these variables.
    pub fn render(&self, variables: Vec<(String, Value)>) -> Result<String> {
        Interpreter::new(variables).render(&self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::time::{Duration, Instant};

    use super::{Template, Value};

    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/processor/templates.json");

    fn render(source: &str) -> Result<String, String> {
        let words = Value::map([("type", "text".into()), ("text", "a red cube <b> & 'c' 左边\n\n".into())]);
        let content = Value::list(vec![Value::map([("type", "image".into())]), words]);
        let turn = Value::map([("role", "user".into()), ("content", content)]);
        let variables = [
            ("messages", Value::list(vec![turn])),
            ("add_generation_prompt", Value::Bool(true)),
            ("tools", Value::None),
            ("documents", Value::None),
            ("bos_token", "<s>".into()),
            ("eos_token", "<|im_end|>".into()),
            ("pad_token", "<|endoftext|>".into()),
        ];
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let template = Template::parse(source).map_err(|e| e.to_string())?;
        template.render(variables).map_err(|e| e.to_string())
    }

    /// What `tests/reference/make_template_fixtures.py` had transformers render.
    #[test]
    fn each_construct_is_rendered_as_transformers_renders_it_or_refused() {
        let file = std::env::var("SPATIALSCORE_TEMPLATES").unwrap_or_else(|_| FIXTURE.to_owned());
        let cases: Vec<(String, Option<String>)> =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let mut wrong = Vec::new();
        let (mut equal, mut refused) = (0, 0);
        for (source, expected) in &cases {
            match (expected, render(source)) {
                (Some(expected), Ok(text)) if text == *expected => equal += 1,
                (Some(_), Err(_)) => refused += 1,
                (None, Err(_)) => {}
                (expected, found) => wrong.push(format!("{source:?}: {found:?}, and not {expected:?}")),
            }
        }
        println!("{} templates: {equal} are rendered alike, {refused} are refused here alone", cases.len());
        assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
        assert!(equal > 1000 && refused * 8 < equal);
    }

    #[test]
    fn no_template_hangs_or_fills_memory() {
        let deep =
            |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(5000), close.repeat(5000));
        let nested = "{% if true %}".repeat(5000) + &"{% endif %}".repeat(5000);
        let hostile = [
            "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in [] %}{% endfor %}{% endfor %}{% endfor %}",
            "{{ 'x' * 10 ** 15 }}",
            "{{ [1] * 10 ** 15 }}",
            "{{ range(10 ** 15)|list }}",
            "{{ 'x'.center(10 ** 15) }}",
            "{{ 'x'|center(10 ** 15) }}",
            "{{ '1'.zfill(10 ** 15) }}",
            "{{ 'x'|indent(10 ** 15, true) }}",
            "{{ '%999999999d' % 1 }}",
            "{{ '%.999999999f' % 1.5 }}",
            "{{ '{:999999999}'.format(1) }}",
            "{{ [1]|batch(10 ** 15, 0)|list }}",
            "{{ [1]|slice(10 ** 15)|list }}",
            "{{ [1]|tojson(indent=10 ** 15) }}",
            "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
            "{{ ('y' * 1000000).join('x' * 1000000) }}",
            "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
            "{% set ns = namespace(a=[1]) %}{% for i in range(90000) %}{% set ns.a = [ns.a] %}{% endfor %}",
            "{% set ns = namespace(a=[1]) %}{% for i in range(30) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a }}",
            "{% set ns = namespace(a=[1]) %}{% for i in range(30) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
            "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
            "{% for x in range(99999)|map('string')|map('upper')|map('lower')|list|sort|unique %}{{ x }}{% endfor %}",
            &deep("(", ")"),
            &deep("[", "]"),
            &deep("-", ""),
            &deep("not ", ""),
            &format!("{{{{ 1{} }}}}", " + 1".repeat(5000)),
            &format!("{{{{ x{} }}}}", ".a".repeat(5000)),
            &format!("{{{{ 1{} }}}}", "|string".repeat(5000)),
            &format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(5000)),
            &nested,
        ];
        for source in hostile {
            let start = Instant::now();
            let shown: String = source.chars().take(80).collect();
            assert!(render(source).is_err(), "{shown}");
            assert!(start.elapsed() < Duration::from_secs(5), "{shown} took {:?}", start.elapsed());
        }
    }

    #[test]
    fn a_refusal_names_construct_and_line() {
        for (source, expected) in [
            ("a\n{{ x|groupby('y') }}", "line 2: the filter \"groupby\" is not supported"),
            ("\n\n{% include 'x' %}", "line 3: the tag {% include %} is not supported"),
            ("{{ 'x'.encode() }}", "line 1: the method encode() of a text is not supported"),
            ("{% if true %}\n{{ raise_exception('no') }}{% endif %}", "line 2: it raises an exception: no"),
        ] {
            assert_eq!(render(source).unwrap_err(), expected);
        }
    }
}
