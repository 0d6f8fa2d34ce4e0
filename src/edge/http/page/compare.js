// Compare: pictures of one prompt as a group.

import { ask } from './api.js';
import { h, score, table } from './dom.js';
import { advantages, beats, ranks, scale, short } from './maths.js';

const FEWEST = 2;
const MOST = 24;

/** Scores the pictures as a group and gives what is to be shown. */
export async function run({ pictures, prompt, models }, signal) {
  if (pictures.length < FEWEST || pictures.length > MOST) throw new Error(`Choose ${FEWEST} to ${MOST} pictures; there are ${pictures.length}.`);
  const fields = [['prompt', prompt], ...models.map(model => ['model', model]), ...pictures.map(({ file }) => ['image', file])];
  const answer = await (await ask('v1/score', fields, signal)).json();
  return answer.receipts.flatMap(({ model }, index) => group(model, answer.items.map((item, at) => ({ ...item.scores[index], ...pictures[at], number: at + 1 }))));
}

function group(model, all) {
  const scored = all.filter(one => !one.error);
  const failed = all.filter(one => one.error).map(one => h('p', { class: 'bad' }, `${one.number}. ${one.name} has no score: ${one.error.message}`));
  if (scored.length < FEWEST) return [h('h2', {}, model), ...failed, h('p', {}, 'Fewer than two pictures have a score: there is nothing to compare.')];
  const means = scored.map(one => one.mean);
  const [places, gains, shared] = [ranks(means), advantages(means), scale(scored)];
  const k = Math.max(1, Math.floor(scored.length / 4));
  const order = scored.map((one, at) => ({ ...one, rank: places[at], gain: gains[at] })).sort((a, b) => a.rank - b.rank || a.number - b.number);
  const mark = rank => {
    if (means.every(mean => mean === means[0])) return '';
    if (rank <= k) return h('span', { class: 'top' }, `top ${k}`);
    return rank > scored.length - k ? h('span', { class: 'bottom' }, `bottom ${k}`) : '';
  };
  const name = one => h('th', { class: 'text', scope: 'row' }, h('img', { class: 'thumb', src: one.url, alt: '' }), `${one.number}. ${one.name}`);
  const percent = chance => `${Math.round(chance * 100)} %`;
  const sigmas = scored.every(one => one.stddev != null);
  return [
    h('h2', {}, model), ...failed,
    table(`${model}: ranked`, ['Rank', h('th', { class: 'text', scope: 'col' }, 'Picture'), h('th', { class: 'text', scope: 'col' }, 'Score'), 'Advantage', 'Mark'],
      order.map(one => [String(one.rank), name(one), h('td', { class: 'text' }, score(one, shared, short)), short(one.gain), mark(one.rank)])),
    h('p', { class: 'soft' }, 'The advantage is what GRPO would take: the score less the group\'s mean, over the group\'s standard deviation + 0.0001, as flow_grpo has it.'),
    table(`${model}: chance that the row beats the column`, ['Picture', ...order.map(one => `${one.number}`)],
      order.map(row => [h('th', { scope: 'row' }, `${row.number}`), ...order.map(column => (row === column ? '–' : percent(beats(row, column))))])),
    h('p', { class: 'soft' }, sigmas ? 'From mean and sigma, as if the two rewards were Gaussian and independent.' : 'This model gives no sigma: the higher score wins for certain, which says nothing of how sure the model is.'),
  ];
}
