// Recent: what was scored in the last minutes, and what scores high.

import { call } from './api.js';
import { h, s, table } from './dom.js';
import { ago, scale, short } from './maths.js';

/** Asks what was scored of late and gives what is to be shown. */
export async function run({ seconds, most }, signal) {
  const query = new URLSearchParams({ most, ...(seconds && { seconds }) });
  const answer = await (await call(`v1/recent?${query}`, { signal })).json();
  const who = answer.of_all_callers ? 'all callers' : 'you';
  return [
    h('h2', {}, `The last ${ago(answer.seconds)}`),
    h('p', { class: 'soft' }, `What ${who} had scored. A score is forgotten after ${ago(answer.keep_seconds)}, and earlier where there is no room.`),
    ...(answer.series.length ? answer.series.flatMap(series) : [h('p', {}, 'Nothing was scored in this time.')]),
    answer.left_out ? h('p', {}, `There are ${answer.left_out} more, with fewer scores.`) : null,
  ];
}

function series(one) {
  const { scores, groups } = one;
  const flat = Math.round((100 * groups.without_spread) / groups.count);
  const said = groups.count
    ? `Groups of several pictures of one prompt: ${groups.count}; without spread: ${groups.without_spread} (${flat} %). A group without spread teaches a policy nothing.`
    : 'No prompt has several pictures.';
  return [
    h('h2', {}, `${one.model}, asked by ${one.caller} (${one.priority})`),
    h('p', {}, `${scores.count} scores: mean `, h('span', { class: 'number' }, short(scores.mean)), `, standard deviation ${short(scores.stddev)}, from ${short(scores.lowest)} to ${short(scores.highest)}.`),
    h('p', { class: groups.without_spread ? 'bad' : '' }, said),
    ...time(one.over_time),
    ...trends(one),
    ...shown('Highest', one.highest),
    ...shown('Lowest', one.lowest),
    one.least_spread.length ? table('Groups, the least spread first', [h('th', { class: 'text', scope: 'col' }, 'Prompt'), 'Pictures', 'Mean', 'Std. dev.', 'Lowest', 'Highest'],
      one.least_spread.map(group => [h('td', { class: 'text' }, group.prompt ?? group.group), `${group.count}`, ...[group.mean, group.stddev, group.lowest, group.highest].map(short)])) : null,
  ];
}

/** The distribution over time: for each part of it a box of quartiles, the median, and a line from the lowest to the highest. */
function time(parts) {
  const known = parts.filter(({ quantiles }) => quantiles);
  const [low, high] = scale(known.flatMap(({ quantiles }) => [quantiles[0], quantiles[4]]).map(mean => ({ mean })));
  const [width, height] = [10 * parts.length, 100];
  const y = value => (height * (high - value)) / (high - low);
  const line = (x1, x2, a, b) => s('line', { class: 'mean', x1, x2, y1: y(a), y2: y(b), 'vector-effect': 'non-scaling-stroke' });
  const box = ({ quantiles }, index) => {
    if (!quantiles) return [];
    const [least, lower, median, upper, most] = quantiles;
    const x = 10 * index;
    return [line(x + 5, x + 5, least, most), s('rect', { class: 'sigma', x: x + 2, width: 6, y: y(upper), height: Math.max(y(lower) - y(upper), 0.5) }), line(x + 2, x + 8, median, median)];
  };
  const label = `Scores over ${ago(parts[0].from_seconds_ago)}, in ${parts.length} parts; the medians go from ${short(known[0].quantiles[2])} to ${short(known.at(-1).quantiles[2])}.`;
  const from = ({ from_seconds_ago, to_seconds_ago }) => `${ago(from_seconds_ago)} to ${ago(to_seconds_ago)}`;
  return [
    h('figure', {}, s('svg', { class: 'time', viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': label }, parts.flatMap(box)),
      h('figcaption', { class: 'soft' }, `From ${short(low)} below to ${short(high)} above; the newest on the right. Box: the middle half, with the median; line: lowest to highest.`)),
    h('details', {}, h('summary', {}, 'Over time, in numbers'), table('Scores over time', ['Ago', 'Scores', 'Lowest', 'Lower quartile', 'Median', 'Upper quartile', 'Highest'],
      parts.map(part => [from(part), `${part.count}`, ...(part.quantiles ?? ['', '', '', '', '']).map(value => (value === '' ? '' : short(value)))]))),
  ];
}

function trends({ saturation, sharpness }) {
  if (!saturation) return [h('p', { class: 'soft' }, 'Of none of these pictures saturation and sharpness are known: all scores came from memory.')];
  const row = (name, trend) => [h('th', { class: 'text', scope: 'row' }, name), ...[trend.mean, trend.of_highest_quarter, trend.of_lowest_quarter].map(short), trend.rank_correlation == null ? '–' : trend.rank_correlation.toFixed(2).replace('-', '\u2212')];
  return [
    table('What scores high', [h('th', { class: 'text', scope: 'col' }, 'Property'), 'All', 'Highest quarter', 'Lowest quarter', 'Rank correlation'], [row('Saturation', saturation), row('Sharpness', sharpness)]),
    h('p', { class: 'soft' }, 'Saturation: the mean of HSV\'s, from 0 to 1. Sharpness: the variance of the Laplacian. A correlation that stays far from 0 is what a policy will learn, whatever the prompt says.'),
  ];
}

function shown(words, pictures) {
  if (!pictures.length) return [];
  const one = ({ mean, stddev, seconds_ago, prompt, png }) => h('li', {},
    png ? h('img', { class: 'thumb', src: `data:image/png;base64,${png}`, alt: prompt ?? 'A picture without its prompt' }) : null,
    h('span', { class: 'number' }, stddev == null ? short(mean) : `${short(mean)} ± ${short(stddev)}`),
    h('span', { class: 'soft' }, `${ago(seconds_ago)} ago`), prompt ? h('span', { class: 'words' }, prompt) : null);
  return [h('h3', {}, words), h('ul', { class: 'shown' }, pictures.map(one))];
}
