// The page: what is chosen, and which of the four views is asked for.

import { Refused, call } from './api.js';
import * as compare from './compare.js';
import { get, h } from './dom.js';
import * as chosen from './pictures.js';
import * as recent from './recent.js';
import * as score from './score.js';
import * as why from './why.js';

const MODES = {
  score: { ...score, go: 'Score', about: 'Each picture under the prompt, by itself.' },
  compare: { ...compare, go: 'Compare', about: '2 to 24 pictures under one prompt, as a group.' },
  why: { ...why, go: 'Explain', about: 'What one picture\'s score loses by what is changed. Takes as many scores as there are cells, behind training.' },
  recent: { ...recent, go: 'Look', about: 'What was scored in the last minutes. It is asked for when you look, and not again.', chooses: false },
};
let mode = 'score';
let running = null;

function choose(name, focus) {
  mode = name;
  for (const other of Object.keys(MODES)) {
    const tab = get(`tab-${other}`);
    tab.setAttribute('aria-selected', other === name);
    tab.tabIndex = other === name ? 0 : -1;
    if (other === name && focus) tab.focus();
  }
  get('go').textContent = MODES[name].go;
  get('about').textContent = MODES[name].about;
  get('why-options').hidden = name !== 'why';
  get('recent-options').hidden = name !== 'recent';
  // What is hidden is not to be filled in.
  get('what').disabled = get('what').hidden = MODES[name].chooses === false;
  get('results').setAttribute('aria-labelledby', `tab-${name}`);
}

function listenToTabs() {
  const names = Object.keys(MODES);
  for (const name of names) {
    get(`tab-${name}`).addEventListener('click', () => choose(name));
    get(`tab-${name}`).addEventListener('keydown', ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (step) choose(names[(names.indexOf(name) + step + names.length) % names.length], true);
    });
  }
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  const prompt = get('prompt').value.trim();
  const models = [...document.querySelectorAll('#model-list input:checked')].map(box => box.value);
  const pictures = [...chosen.pictures];
  get('problem').textContent = '';
  if (!pictures.length && MODES[mode].chooses !== false) {
    get('problem').textContent = 'Choose a picture first.';
    return get('files').focus();
  }
  running = new AbortController();
  get('go').disabled = true;
  get('stop').hidden = false;
  get('status').textContent = 'Working …';
  const show = nodes => get('results').replaceChildren(...nodes.filter(node => node != null));
  try {
    const asked = { pictures, prompt, models, cells: Number(get('cells').value), seconds: get('seconds').value, most: get('most').value };
    show(await MODES[mode].run(asked, running.signal, show));
    get('status').textContent = 'Done.';
    get('results').focus();
  } catch (error) {
    get('status').textContent = '';
    get('problem').textContent = error.message;
    if (!(error instanceof Refused)) console.debug(error);
  } finally {
    running = null;
    get('go').disabled = false;
    get('stop').hidden = true;
  }
}

async function showModels() {
  const { models, explain } = await (await call('v1/models')).json();
  get('server').textContent = `${models.map(({ name, state }) => (state === 'serving' ? name : `${name} (${state})`)).join(', ')}, server ${models[0].server_version}`;
  get('notices').replaceChildren(...models.filter(({ notice }) => notice).map(({ name, notice }) => h('p', { class: 'notice' }, h('strong', {}, `${name}: `), notice)));
  get('model-list').replaceChildren(...models.map(({ name, state }, index) => h('label', {},
    h('input', { type: 'checkbox', value: name, checked: index === 0, disabled: state !== 'serving' }), name)));
  get('models').hidden = models.length === 1;
  get('cells').max = explain.max_cells;
}

async function showSamples() {
  const manifest = await (await fetch('page/samples/manifest.jsonl')).text();
  const samples = manifest.trim().split('\n').map(line => JSON.parse(line));
  const use = async sample => {
    const blob = await (await fetch(`page/samples/${sample.image}`)).blob();
    get('prompt').value = sample.prompt;
    chosen.add([new File([blob], sample.image, { type: blob.type })]);
  };
  get('sample-list').replaceChildren(...samples.map(sample => h('button', { type: 'button', onclick: () => use(sample) },
    h('img', { class: 'thumb', src: `page/samples/${sample.image}`, alt: '', loading: 'lazy' }), sample.id)));
}

chosen.listen();
choose(mode);
listenToTabs();
get('form').addEventListener('submit', submit);
get('stop').addEventListener('click', () => running?.abort());
showSamples().catch(() => { get('samples').hidden = true; });
showModels().catch(error => { get('problem').textContent = error.message; });
