// Why: what the score of one picture loses by what is changed.

import { ask, lines } from './api.js';
import { h, s, table } from './dom.js';
import { short } from './maths.js';

/** Explains the first picture, and shows it as it comes. */
export async function run({ pictures, prompt, models, cells }, signal, show) {
  if (pictures.length !== 1) throw new Error(`Choose one picture; there are ${pictures.length}.`);
  if (models.length > 1) throw new Error('Choose one model.');
  const [picture] = pictures;
  const fields = [['prompt', prompt], ...models.map(model => ['model', model]), ['image', picture.file], ['cells', String(cells)]];
  const response = await ask('v1/explain', fields, signal);
  const found = { cell: [], dropped: [], turned: [] };
  const progress = h('progress', { max: 1, value: 0, 'aria-label': 'Progress' });
  show([progress]);
  let done = 0;
  for await (const line of lines(response)) {
    if (line.kind === 'plan') {
      found.plan = line;
      progress.max = line.scores;
      continue;
    }
    if (line.kind === 'error') {
      show(view(picture, found));
      throw new Error(line.error.message);
    }
    if (line.kind === 'done') return view(picture, found);
    progress.value = ++done;
    if (Array.isArray(found[line.kind])) found[line.kind].push(line);
    else found[line.kind] = line;
  }
  show(view(picture, found));
  throw new Error('The answer ended early.');
}

const number = line => (line?.error ? h('span', { class: 'bad' }, line.error.message) : line ? short(line.mean) : '');
const cost = line => (line && !line.error ? short(line.cost) : '');

function view(picture, { plan, whole, mirrored, dropped, turned, cell }) {
  if (!whole) return [];
  const changes = (caption, head, rows) => (rows.length ? table(caption, head, rows) : null);
  const text = words => h('td', { class: 'text' }, words);
  const wide = words => h('th', { class: 'text', scope: 'col' }, words);
  return [
    h('h2', {}, 'Why'),
    h('p', {}, 'The score is ', h('span', { class: 'number' }, short(whole.mean)), whole.stddev == null ? '' : ` ± ${short(whole.stddev)}`,
      '. A cost is how much lower it is with one thing changed; below nought it is higher.'),
    ...map(picture, plan, cell),
    h('h2', {}, 'Clauses'),
    changes('Each clause left out', [wide('Left out'), 'Score', 'Cost'], dropped.map(line => [text(line.text), number(line), cost(line)])) ?? h('p', {}, 'The prompt has one clause: there is none to leave out.'),
    h('p', { class: 'soft' }, 'Tells how much the score hangs on a clause being there; not whether the picture keeps it, since a shorter prompt is another prompt.'),
    changes('Each relation turned round', [wide('From'), wide('To'), 'Score', 'Cost'], turned.map(line => [text(line.from), text(line.to), number(line), cost(line)])) ?? h('p', {}, 'No relation was found that can be turned round.'),
    h('p', { class: 'soft' }, 'Tells whether the model heeds the direction: where it does and the picture keeps the relation, turning it round costs much. It goes by a list of English words, and may turn a word that is no relation.'),
    h('h2', {}, 'Mirrored'),
    h('p', {}, 'The picture with left and right changed over scores ', number(mirrored), ', which costs ', cost(mirrored), '.'),
    h('p', { class: 'soft' }, 'Tells whether left and right matter at all; of a prompt without them it should cost nothing, and lettering turns with it.'),
  ];
}

function map(picture, plan, cells) {
  const costs = cells.filter(one => !one.error);
  if (!plan.rows || !costs.length) return [];
  const most = Math.max(...costs.map(one => Math.abs(one.cost))) || 1;
  const worst = costs.reduce((a, b) => (b.cost > a.cost ? b : a));
  const around = plan.reach ? ` and the ${(2 * plan.reach + 1) ** 2 - 1} around it` : '';
  const place = one => `row ${one.row + 1}, column ${one.column + 1}`;
  return [
    h('h2', {}, 'Map'),
    h('div', { class: 'map' }, h('img', { src: picture.url, alt: '' }),
      s('svg', { viewBox: `0 0 ${plan.columns} ${plan.rows}`, preserveAspectRatio: 'none', role: 'img',
        'aria-label': `What covering each cell${around} costs. The highest cost: ${short(worst.cost)} at ${place(worst)} of ${plan.rows} rows and ${plan.columns} columns.` },
      costs.map(one => s('rect', { class: one.cost > 0 ? 'falls' : 'rises', x: one.column, y: one.row, width: 1, height: 1, 'fill-opacity': (0.75 * Math.abs(one.cost)) / most },
        s('title', {}, `${place(one)}: ${short(one.cost)}`))))),
    h('p', { class: 'soft' }, `Red: covering the cell${around} with the picture's mean colour lowers the score; blue: it raises it. The strongest colour stands for ${short(most)}. Exact for each; it does not tell where a thing ends, what two of them do together, nor what the model takes a flat patch for. A low score has little to lose.`),
    h('details', {}, h('summary', {}, 'The map in numbers'), table('What covering each cell costs', ['Row', 'Column', 'Cost'], cells.map(one => [`${one.row + 1}`, `${one.column + 1}`, cost(one) || number(one)]))),
  ];
}
