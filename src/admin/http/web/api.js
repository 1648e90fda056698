// Calls of the API, the token they need, and the stream of live state.

import { h } from './dom.js';

const TOKEN = 'pgcutover-token';

/** What the daemon refused, in its words. */
export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail || `the daemon answered ${status}`);
    this.status = status;
    this.hint = problem.hint || null;
  }
}

async function call(method, path, body, headers = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const all = { accept: 'application/json', ...headers };
  if (token && method !== 'GET') all.authorization = `Bearer ${token}`;
  if (body !== undefined) all['content-type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, { method, headers: all, cache: 'no-store', body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, { detail: 'the daemon cannot be reached', hint: 'see whether `pgcutover run` is running' });
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401 && await askToken(problem.detail)) return call(method, path, body, headers);
  throw new Refusal(response.status, problem);
}

export const get = (path) => call('GET', path);
export const post = (path, body, headers) => call('POST', path, body, headers);
export const remove = (path) => call('DELETE', path);

/** Address of a migration and what belongs to it. */
export const of = (name, rest = '') => `/api/v1/migrations/${encodeURIComponent(name)}${rest}`;

/** A key that makes a repeated call harmless. */
export function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Asks for the token; true: one was given. It is kept for this tab alone. */
export function askToken(reason) {
  return ask({
    title: 'Token', good: 'Use it',
    body: [
      reason ? h('p', {}, reason) : null,
      h('div', { class: 'field' },
        h('label', { for: 'token' }, 'Value of token in section [admin]'),
        h('p', { class: 'hint', id: 'token-hint' }, 'Kept in this tab until it is closed, and sent with what changes something.'),
        h('input', { id: 'token', type: 'password', autocomplete: 'off', 'aria-describedby': 'token-hint' })),
    ],
    read: () => document.getElementById('token').value.trim(),
  }).then((token) => {
    if (token === null) return false;
    if (token === '') sessionStorage.removeItem(TOKEN);
    else sessionStorage.setItem(TOKEN, token);
    return token !== '';
  });
}

/** A question in a dialog. Resolves to what `read` gives (or true), or null where it was turned down. */
export function ask({ title, body, good, danger = false, read = () => true }) {
  const dialog = document.getElementById('dialog');
  const before = document.activeElement;
  const form = h('form', { method: 'dialog' },
    h('h2', { id: 'dialog-title' }, title), body,
    h('div', { class: 'actions' },
      h('button', { type: 'button', id: 'dialog-no', autofocus: danger }, 'Back'),
      h('button', { type: 'submit', id: 'dialog-yes', class: danger ? 'danger' : 'primary' }, good)));
  dialog.replaceChildren(form);
  return new Promise((resolve) => {
    let answer = null;
    form.addEventListener('submit', () => { answer = read(); });
    form.querySelector('#dialog-no').addEventListener('click', () => dialog.close());
    dialog.addEventListener('close', () => {
      if (before && before.isConnected) before.focus();
      resolve(answer);
    }, { once: true });
    dialog.showModal();
  });
}

let calls = null;

/** Whether this daemon has a call: it is asked for what it can do, and never assumed to. */
export async function knows(path) {
  calls ??= get('/api/v1/openapi.json').then((document) => new Set(Object.keys(document.paths)));
  try {
    return (await calls).has(path);
  } catch {
    calls = null;
    return false;
  }
}

/** Follows the live state; a stream that was lost is opened again. */
export function follow(changed, linked) {
  const source = new EventSource('/api/v1/live');
  source.addEventListener('live', (event) => { linked(true); changed(JSON.parse(event.data)); });
  source.addEventListener('error', () => {
    linked(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => follow(changed, linked), 3000);
  });
}
