//! What two judges of the same items have in common.

/// Spearman's rank correlation; equals have the mean of their ranks. `None` where one side has no differences, or there is one
/// pair at most.
pub fn rank_correlation(pairs: &[(f32, f32)]) -> Option<f64> {
    let ranks = [ranks(pairs.iter().map(|pair| pair.0)), ranks(pairs.iter().map(|pair| pair.1))];
    // The mean of all ranks.
    let middle = (pairs.len() as f64 - 1.0) / 2.0;
    let [one, other] = ranks.map(|ranks| ranks.into_iter().map(|rank| rank - middle).collect::<Vec<_>>());
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale = (product(&one, &one) * product(&other, &other)).sqrt();
    (scale > 0.0).then(|| product(&one, &other) / scale)
}

fn ranks(values: impl Iterator<Item = f32>) -> Vec<f64> {
    let mut order: Vec<(f32, usize)> = values.zip(0..).collect();
    order.sort_unstable_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut ranks = vec![0.0; order.len()];
    let mut before = 0;
    for equal in order.chunk_by(|(a, _), (b, _)| a == b) {
        let rank = before as f64 + (equal.len() as f64 - 1.0) / 2.0;
        equal.iter().for_each(|&(_, place)| ranks[place] = rank);
        before += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of `scipy.stats.spearmanr`.
    #[test]
    fn ranks_are_correlated_as_scipy_has_it() {
        let near = |pairs: &[(f32, f32)], wanted: f64| {
            let got = rank_correlation(pairs).unwrap();
            assert!((got - wanted).abs() < 1e-12, "{pairs:?}: {got}");
        };
        near(&[(1.0, 10.0), (2.0, 100.0), (3.0, 1000.0)], 1.0);
        near(&[(1.0, -1.0), (2.0, -2.0), (5.0, -3.0)], -1.0);
        near(&[(1.0, 5.0), (2.0, 6.0), (3.0, 7.0), (4.0, 8.0), (5.0, 7.0)], 0.820_782_681_668_123_3);
        near(
            &[(1.0, 3.0), (1.0, 1.0), (2.0, 2.0), (-0.0, 2.0), (0.0, 2.0), (9.5, -4.0)],
            -0.468_979_049_610_541_76,
        );
        assert_eq!(rank_correlation(&[]), None);
        assert_eq!(rank_correlation(&[(1.0, 2.0)]), None);
        assert_eq!(rank_correlation(&[(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]), None);
    }
}
