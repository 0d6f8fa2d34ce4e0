// Calls of the server that this page came from.

import { get } from './dom.js';

const KEPT = 'spatialscore-token';

/** What a call was refused with, in words. */
export class Refused extends Error {}

/** Asks for a token until one is given. */
function askForToken(refused) {
  const dialog = get('token-dialog');
  get('token-refused').textContent = refused ? 'This token is not known here.' : '';
  get('token').value = '';
  if (!dialog.open) dialog.showModal();
  return new Promise((given, closed) => {
    dialog.addEventListener('close', () => {
      const token = get('token').value.trim();
      if (!token) return closed(new Refused('No token was given.'));
      sessionStorage.setItem(KEPT, token);
      given();
    }, { once: true });
  });
}

/** Makes a call, with the token where there is one, and asks for one where the server does. */
export async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEPT);
    const headers = { ...options.headers };
    if (token) headers.authorization = `Bearer ${token}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: 'no-store' });
    } catch (error) {
      if (error.name === 'AbortError') throw new Refused('Stopped.');
      throw new Refused('The server does not answer.');
    }
    if (response.ok) return response;
    const said = await response.json().then(body => body.detail, () => response.statusText);
    if (response.status !== 401) throw new Refused(said || `The server answers ${response.status}.`);
    sessionStorage.removeItem(KEPT);
    await askForToken(Boolean(token));
  }
}

/** A form of what is asked, at the priority that lets training go first. */
export function ask(path, fields, signal) {
  const body = new FormData();
  for (const [name, value] of fields) body.append(name, value);
  return call(path, { method: 'POST', body, signal, headers: { 'x-spatialscore-priority': 'evaluation' } });
}

/** The lines of JSON of an answer, as they come. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch(error => {
      throw new Refused(error.name === 'AbortError' ? 'Stopped.' : 'The server hung up.');
    });
    if (done) return;
    const parts = (rest + value).split('\n');
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
