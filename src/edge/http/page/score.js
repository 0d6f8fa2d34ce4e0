// Score: each picture by itself, and what the model saw of it.

import { ask } from './api.js';
import { h, score } from './dom.js';
import { scale, short } from './maths.js';

/** Scores the pictures and gives what is to be shown. */
export async function run({ pictures, prompt, models }, signal) {
  const shared = [['prompt', prompt], ...models.map(model => ['model', model])];
  const answer = await (await ask('v1/score', [...shared, ...pictures.map(({ file }) => ['image', file])], signal)).json();
  const { preprocess_seconds, queue_seconds, inference_seconds } = answer.timings;
  const milliseconds = seconds => `${Math.max(1, Math.round(seconds * 1000))} ms`;
  const scales = answer.receipts.map((_, model) => {
    const scores = answer.items.map(item => item.scores[model]).filter(one => !one.error);
    return scores.length ? scale(scores) : [0, 1];
  });
  const card = (item, index) => h('article', { class: 'card' },
    h('img', { class: 'thumb', src: pictures[index].url, alt: `Picture ${index + 1}` }),
    h('div', {}, h('h3', {}, `${index + 1}. ${pictures[index].name}`), item.scores.map((one, model) => of(one, scales[model], models.length > 1)),
      seen(pictures[index], shared)));
  return [
    h('h2', {}, 'Scores'),
    h('p', { class: 'soft' }, `Prepared in ${milliseconds(preprocess_seconds)}, waited ${milliseconds(queue_seconds)}, computed in ${milliseconds(inference_seconds)}: the longest of these pictures. `,
      'The box is one sigma on either side of the mean; all boxes of a model have one scale.'),
    answer.items.map(card),
    h('details', {}, h('summary', {}, 'Receipt'), answer.receipts.map(receipt => h('p', { class: 'name' },
      `${receipt.model}: revision ${receipt.revision}, ${receipt.dtype}, profile ${receipt.profile_digest || 'its own'}, server ${receipt.server_version}`))),
  ].flat();
}

function of(one, scale, named) {
  const name = named ? h('strong', {}, one.model, ' ') : null;
  if (one.error) return h('p', { class: 'bad' }, name, `No score: ${one.error.message}`);
  const parts = one.components ?? [];
  return h('div', {}, name, score(one, scale, short),
    parts.length ? h('ul', {}, parts.map(part => h('li', {}, `${part.name}: ${short(part.mean)}`, part.stddev == null ? '' : ` ± ${short(part.stddev)}`))) : null);
}

/** What the models saw, which is asked for once somebody looks. */
function seen(picture, shared) {
  const box = h('div', {}, h('p', {}, 'Asking …'));
  let asked = false;
  const look = async event => {
    if (!event.target.open || asked) return;
    asked = true;
    try {
      const answer = await (await ask('v1/score', [...shared, ['image', picture.file], ['inspect', 'true']])).json();
      box.replaceChildren(...answer.items[0].scores.flatMap(one => eyes(one)));
    } catch (error) {
      asked = false;
      box.replaceChildren(h('p', { class: 'bad', role: 'alert' }, error.message));
    }
  };
  return h('details', { ontoggle: look }, h('summary', {}, 'What the model saw'), box);
}

function eyes({ model, seen, error }) {
  if (!seen) return [h('p', { class: 'bad' }, `${model} saw nothing: ${error?.message ?? 'it cannot be shown'}`)];
  const span = ({ kind, text, tokens }) => {
    if (kind === 'picture') return h('span', { class: 'picture' }, `${text} × ${tokens}`);
    if (kind === 'read') return h('mark', { title: 'Here the reward is read' }, text);
    return h('span', { class: kind }, text);
  };
  return [
    h('p', {}, `${model}: ${seen.tokens} tokens, ${seen.visual_tokens} of them the picture's.`),
    ...seen.pictures.map(({ width, height, png }) => h('figure', {},
      h('img', { class: 'seen', src: `data:image/png;base64,${png}`, width, height, alt: 'The picture as the model saw it' }),
      h('figcaption', {}, `${width} × ${height}: turned, resized, without transparency.`))),
    h('p', {}, 'The conversation. The reward is read at the marked token.'),
    ...seen.conversations.map(spans => h('div', { class: 'conversation' }, spans.map(span))),
  ];
}
