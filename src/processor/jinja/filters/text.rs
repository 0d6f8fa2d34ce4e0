//! Filters that lay a text out.

use super::{integer, string};
use crate::processor::jinja::interpreter::Bound;
use crate::processor::jinja::methods;
use crate::processor::jinja::value::{Budget, Value};
use crate::processor::jinja::{Result, refuse};

pub(super) fn truncate(text: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    let [length, whole, end, leeway] = arguments.take(["length", "killwords", "end", "leeway"])?;
    let length = length.map_or(Ok(255), |length| integer(&length, "truncate"))?;
    let end = end.map_or(Ok("...".into()), |end| string(&end, "truncate"))?;
    let leeway = leeway.filter(|l| !matches!(l, Value::None));
    let leeway = leeway.map_or(Ok(5), |leeway| integer(&leeway, "truncate"))?;
    let kept = length - end.chars().count() as i64;
    let Some(kept) = usize::try_from(kept).ok().filter(|_| leeway >= 0) else {
        return refuse(format!("truncate cannot cut to {length} characters that end with {end:?}"));
    };
    if text.chars().count() as i64 <= length.saturating_add(leeway) {
        return budget.text(text);
    }
    let cut: String = text.chars().take(kept).collect();
    let words = if whole.is_some_and(|whole| whole.is_true()) {
        cut.as_str()
    } else {
        cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before)
    };
    budget.text(format!("{words}{end}"))
}

pub(super) fn indent(text: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    let [width, first, blank] = arguments.take(["width", "first", "blank"])?;
    let margin = match width {
        Some(Value::Str(margin)) => margin.to_string(),
        width => {
            let width = width.map_or(Ok(4), |width| integer(&width, "indent"))?;
            let width = usize::try_from(width).unwrap_or(0);
            budget.bytes(width)?;
            " ".repeat(width)
        }
    };
    let is_true = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let call = Bound { name: "splitlines".into(), ..Bound::default() };
    let lines =
        methods::call(&Value::from(format!("{text}\n")), "splitlines", call, budget)?.items(budget)?;
    let mut out = String::new();
    for (index, line) in lines.iter().filter_map(Value::as_str).enumerate() {
        let indented = if index == 0 { first } else { blank || !line.is_empty() };
        budget.bytes(margin.len() + line.len() + 1)?;
        out.push_str(if index > 0 { "\n" } else { "" });
        out.push_str(if indented { &margin } else { "" });
        out.push_str(line);
    }
    Ok(Value::from(out))
}
