// The pictures that are chosen: by a file dialog, by dropping, by pasting.

import { get, h } from './dom.js';

const TYPES = ['image/png', 'image/jpeg', 'image/webp'];

/** Those that are chosen, in order: { file, name, url }. */
export let pictures = [];
let changed = () => {};

export function onChange(then) {
  changed = then;
}

export function add(files) {
  for (const file of files) pictures.push({ file, name: file.name, url: URL.createObjectURL(file) });
  show();
}

export function clear() {
  // What is on the page still shows them: their URLs go with the page.
  pictures = [];
  show();
}

function remove(index) {
  pictures.splice(index, 1);
  show();
  (get('pictures').querySelectorAll('button')[Math.min(index, pictures.length - 1)] ?? get('files')).focus();
}

function show() {
  get('pictures').replaceChildren(...pictures.map(({ name, url }, index) => h('li', {},
    h('img', { class: 'thumb', src: url, alt: '' }), h('span', { class: 'name', title: name }, name),
    h('button', { type: 'button', 'aria-label': `Remove ${name}`, onclick: () => remove(index) }, 'Remove'))));
  changed();
}

export function listen() {
  const drop = get('drop');
  get('files').addEventListener('change', event => {
    add(event.target.files);
    event.target.value = '';
  });
  for (const name of ['dragenter', 'dragover']) {
    drop.addEventListener(name, event => {
      event.preventDefault();
      drop.classList.add('over');
    });
  }
  drop.addEventListener('dragleave', () => drop.classList.remove('over'));
  drop.addEventListener('drop', event => {
    event.preventDefault();
    drop.classList.remove('over');
    // A file whose kind the browser does not know is the server's to judge.
    add([...event.dataTransfer.files].filter(file => !file.type || file.type.startsWith('image/')));
  });
  document.addEventListener('paste', event => {
    const files = [...event.clipboardData.files].filter(file => TYPES.includes(file.type));
    if (files.length) {
      event.preventDefault();
      add(files);
    }
  });
}
