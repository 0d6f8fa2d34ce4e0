// Numbers of a group of scores. No page in here: `node --test` runs it.

/** The chance that a standard normal variable is below z, to 1e-7 (Abramowitz and Stegun 7.1.26). */
export function normal(z) {
  const x = Math.abs(z) / Math.SQRT2;
  const t = 1 / (1 + 0.3275911 * x);
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const above = 0.5 * series * Math.exp(-x * x);
  return z < 0 ? above : 1 - above;
}

/** The chance that a's reward is above b's, both Gaussian and independent; of scalars 0, ½ or 1. */
export function beats(a, b) {
  const spread = Math.hypot(a.stddev ?? 0, b.stddev ?? 0);
  const gap = a.mean - b.mean;
  if (spread === 0) return gap === 0 ? 0.5 : Number(gap > 0);
  return normal(gap / spread);
}

/** What GRPO takes for advantages, as flow_grpo does: (reward − mean) / (standard deviation + 0.0001), over all n. */
export function advantages(means) {
  const mean = means.reduce((sum, value) => sum + value, 0) / means.length;
  const variance = means.reduce((sum, value) => sum + (value - mean) ** 2, 0) / means.length;
  return means.map(value => (value - mean) / (Math.sqrt(variance) + 1e-4));
}

/** Places from 1, the highest first; equals share the better one. */
export function ranks(means) {
  return means.map(value => 1 + means.filter(other => other > value).length);
}

/** The scale that shows all scores with two of their sigmas on either side. */
export function scale(scores) {
  const low = Math.min(...scores.map(({ mean, stddev }) => mean - 2 * (stddev ?? 0)));
  const high = Math.max(...scores.map(({ mean, stddev }) => mean + 2 * (stddev ?? 0)));
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - margin, high + margin];
}

/** A time in words. */
export function ago(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** A number with what three more digits than its sigma has tell. */
export function short(value) {
  return Number(value.toPrecision(4)).toString().replace('-', '\u2212');
}
