//! The fuzz targets without coverage and without a second build of everything: mutates seeds at random, on stable Rust.
//!
//! mutate TARGET SECONDS [SEED]. Ends with 1 at the first input that panics, caught or not, or takes more than ten
//! seconds, which then lies in artifacts/TARGET.

use std::cell::Cell;
use std::fs;
use std::panic;
use std::path::Path;
use std::process::exit;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use spatialscore_fuzz as targets;

const SLOW: Duration = Duration::from_secs(10);
/// What decoders and parsers look at twice.
const INTERESTING: [u64; 8] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff_ffff, u64::MAX];

/// The input under way, for the hook.
static CURRENT: Mutex<(String, Vec<u8>)> = Mutex::new((String::new(), Vec::new()));

/// xorshift64*: the same seed gives the same inputs.
struct Random(Cell<u64>);

impl Random {
    fn below(&self, bound: usize) -> usize {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

fn mutate(random: &Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 << random.below(5) {
        let at = random.below(input.len() + 1);
        let end = (at + 1 + random.below(32)).min(input.len());
        match random.below(8) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.below(256) as u8,
            2 => drop(input.drain(at.min(end)..end)),
            3 => input.truncate(at),
            4 => {
                let piece = input[at.min(end)..end].to_vec();
                input.splice(at..at, piece);
            }
            5 => {
                let value = INTERESTING[random.below(INTERESTING.len())];
                let width = 1 << random.below(4);
                let bytes = if random.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
                let stop = (at + width).min(input.len());
                let bytes = &bytes[..stop - at.min(stop)];
                input[at.min(stop)..stop].copy_from_slice(bytes);
            }
            6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let piece = &other[from..(from + 1 + random.below(256)).min(other.len())];
                input.splice(at..end.max(at), piece.iter().copied());
            }
            _ => input.insert(at, random.below(256) as u8),
        }
    }
    input
}

fn found(why: &str) -> ! {
    let (target, input) = CURRENT.lock().map(|current| current.clone()).unwrap_or_default();
    let folder = Path::new("artifacts").join(&target);
    let path = folder.join(format!(
        "{}-{:x}",
        why,
        input.iter().fold(5381_u64, |h, &b| h.wrapping_mul(33) ^ u64::from(b))
    ));
    let kept = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, &input));
    eprintln!("{target}: {why}: {} bytes in {} ({kept:?})", input.len(), path.display());
    exit(1);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [target, seconds, rest @ ..] = &arguments[..] else {
        eprintln!("usage: mutate TARGET SECONDS [SEED]");
        exit(64);
    };
    let run: fn(&[u8]) = match target.as_str() {
        "picture" => targets::picture,
        "prompt" => targets::prompt,
        "message" => targets::message,
        "checkpoint" => targets::checkpoint,
        _ => {
            eprintln!("there are picture, prompt, message and checkpoint");
            exit(64);
        }
    };
    let seconds = Duration::from_secs(seconds.parse().expect("a number of seconds"));
    let seed = rest.first().map_or(20_261_123, |seed| seed.parse().expect("a number"));
    let mut seeds: Vec<_> = fs::read_dir(Path::new("corpus").join(target))
        .expect("the seeds: run `seeds corpus` first")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    seeds.sort();
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|path| fs::read(path).expect("a seed")).collect();

    let shown = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        shown(panic);
        found("panic");
    }));
    let random = Random(Cell::new(seed | 1));
    let (start, mut count) = (Instant::now(), 0_u64);
    for seed in &seeds {
        run(seed);
    }
    while start.elapsed() < seconds {
        let input = mutate(&random, &seeds);
        if let Ok(mut current) = CURRENT.lock() {
            *current = (target.clone(), input.clone());
        }
        let begun = Instant::now();
        run(&input);
        if begun.elapsed() > SLOW {
            found("slow");
        }
        count += 1;
    }
    let memory = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = memory.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned();
    println!(
        "{target}: {count} inputs in {:.0?} from {} seeds, nothing found; {peak}",
        start.elapsed(),
        seeds.len()
    );
}
