// The wizard: name and servers, databases, options, summary, start.

import { newKey, post } from './api.js';
import { bytes, h, say } from './dom.js';

const STEPS = ['Name and servers', 'Databases', 'Options', 'Summary'];
const NAME = /^[A-Za-z0-9][A-Za-z0-9-]{0,39}$/;

export function begin(key) {
  return {
    step: 0, key, name: '', check: null, checking: false, all: true, databases: new Set(),
    mode: 'online', option: 'validate-and-migrate', overwrite: false, whenReady: false, error: null, sending: false,
  };
}

export function draw(state) {
  const w = state.wizard;
  const steps = h('ol', { class: 'steps', 'aria-label': 'Steps' }, STEPS.map((label, index) =>
    h('li', { class: index < w.step ? 'done' : index === w.step ? 'now' : null, 'aria-current': index === w.step ? 'step' : null }, label)));
  const body = [servers, databases, options, summary][w.step](w, state);
  return [
    h('div', { class: 'head' }, h('h1', {}, 'New migration')), steps,
    h('form', { class: 'card', 'data-submit': 'wizardNext', novalidate: true, id: `step-${w.step}` },
      h('h2', { id: 'step-title', tabindex: '-1' }, STEPS[w.step]), body,
      w.error ? h('div', { class: 'notice bad', role: 'alert' }, h('p', {}, w.error.message), w.error.hint ? h('p', {}, w.error.hint) : null) : null,
      h('div', { class: 'actions' },
        h('button', { type: 'submit', class: 'primary', id: 'wizard-next', disabled: w.sending }, w.step === STEPS.length - 1 ? 'Start migration' : 'Next'),
        w.step ? h('button', { type: 'button', 'data-act': 'wizardBack' }, 'Back') : null,
        h('a', { class: 'button', href: '#/' }, 'Discard'))),
  ];
}

function servers(w, state) {
  const bad = w.error && w.error.field === 'name';
  return [
    h('div', { class: 'field' },
      h('label', { for: 'name' }, 'Name'),
      h('p', { class: 'hint', id: 'name-hint' }, 'Letters, digits and hyphens, at most 40. A name is used once.'),
      h('input', { id: 'name', type: 'text', 'data-field': 'name', value: w.name, autocomplete: 'off', spellcheck: 'false', maxlength: 40, 'aria-describedby': 'name-hint', 'aria-invalid': bad ? 'true' : null })),
    h('h3', {}, 'Servers, as configured'),
    h('dl', { class: 'facts' },
      h('dt', {}, 'Source'), h('dd', {}, state.live ? state.live.source : '…'),
      h('dt', {}, 'Target'), h('dd', {}, state.live ? state.live.target : '…')),
    h('p', {}),
    h('p', {}, h('button', { type: 'button', id: 'test', 'data-act': 'wizardTest', disabled: w.checking }, w.checking ? 'Testing …' : 'Test connection')),
    w.check ? findings(w.check) : null,
  ];
}

export function findings(check) {
  return h('div', { class: `notice ${check.ok ? 'good' : 'bad'}`, role: 'status', id: 'findings' },
    h('p', {}, check.ok ? 'Both servers answer and can be used.' : 'Something is in the way:'),
    check.ok ? null : h('ul', {}, check.checks.filter((one) => !one.ok).map((one) =>
      h('li', {}, `${one.check}: ${one.found}`, one.fix ? h('pre', {}, one.fix) : null))));
}

function databases(w) {
  const known = w.check && w.check.databases;
  return [
    h('fieldset', {},
      h('legend', {}, 'Which databases'),
      choice('radio', 'which', 'all', w.all, 'Every database of the source', 'Its templates are left out.'),
      choice('radio', 'which', 'some', !w.all, 'Only those chosen here', known ? `${known.length} on the source` : 'Test the connection in the first step to see them.')),
    !w.all && known ? h('fieldset', { id: 'databases' }, h('legend', {}, 'Databases'), known.map((database) =>
      choice('checkbox', 'database', database.name, w.databases.has(database.name), database.name,
        `${bytes(database.size_bytes)}${database.on_target ? ', and the target has a database of this name' : ''}`))) : null,
  ];
}

function options(w) {
  return [
    h('fieldset', {}, h('legend', {}, 'Mode'),
      choice('radio', 'mode', 'online', w.mode === 'online', 'Online', 'Copies, then follows every change until you cut over. Applications go on.'),
      choice('radio', 'mode', 'offline', w.mode === 'offline', 'Offline', 'One consistent copy. Changes made meanwhile are not brought over.')),
    h('fieldset', {}, h('legend', {}, 'What to do'),
      choice('radio', 'option', 'validate-and-migrate', w.option === 'validate-and-migrate', 'Validate and migrate', 'Goes on if nothing fails.'),
      choice('radio', 'option', 'validate', w.option === 'validate', 'Validate', 'Looks at both servers and changes nothing.'),
      choice('radio', 'option', 'migrate', w.option === 'migrate', 'Migrate', 'Without validation first.')),
    h('fieldset', {}, h('legend', {}, 'Also'),
      choice('checkbox', 'overwrite', 'yes', w.overwrite, 'Overwrite the target', 'Empties databases of the target that already hold something.'),
      choice('checkbox', 'whenReady', 'yes', w.whenReady, 'Cut over when ready', 'Without being told, as soon as everything is there.')),
  ];
}

function choice(type, field, value, on, label, hint) {
  const id = `${field}-${value}`;
  return h('label', { class: 'choice', for: id },
    h('input', { type, id, name: field, value, 'data-field': field, checked: on, 'aria-describedby': `${id}-hint` }),
    h('span', {}, label, h('small', { id: `${id}-hint` }, hint)));
}

function chosen(w) {
  return w.all ? [] : [...w.databases];
}

function summary(w, state) {
  return h('dl', { class: 'facts', id: 'summary' },
    h('dt', {}, 'Name'), h('dd', {}, w.name),
    h('dt', {}, 'From'), h('dd', {}, state.live.source),
    h('dt', {}, 'To'), h('dd', {}, state.live.target),
    h('dt', {}, 'Databases'), h('dd', {}, w.all ? 'every database of the source' : chosen(w).join(', ')),
    h('dt', {}, 'Mode'), h('dd', {}, w.mode),
    h('dt', {}, 'What to do'), h('dd', {}, w.option.replaceAll('-', ' ')),
    h('dt', {}, 'Target'), h('dd', {}, w.overwrite ? 'what it holds is overwritten' : 'must be empty'),
    h('dt', {}, 'Cutover'), h('dd', {}, w.mode === 'offline' ? 'none: a copy' : w.whenReady ? 'as soon as everything is ready' : 'when you say so'));
}

/** What keeps a step from being left. */
function wrong(w) {
  if (w.step === 0 && !NAME.test(w.name)) {
    return { field: 'name', message: 'Give it a name of letters, digits and hyphens, not beginning with a hyphen.' };
  }
  if (w.step === 1 && !w.all && w.databases.size === 0) return { message: 'Choose at least one database.' };
  return null;
}

async function test(w, draw) {
  w.checking = true;
  w.error = null;
  draw();
  try {
    w.check = await post('/api/v1/check');
    say(w.check.ok ? 'Both servers answer' : 'Something is in the way');
  } catch (error) {
    w.error = error;
  }
  w.checking = false;
  draw();
}

async function start(w, draw) {
  w.sending = true;
  draw();
  try {
    const body = {
      name: w.name, databases: chosen(w), mode: w.mode, option: w.option,
      overwrite_target: w.overwrite, cutover_when_ready: w.mode === 'online' && w.whenReady,
    };
    await post('/api/v1/migrations', body, { 'idempotency-key': w.key });
    location.hash = `#/m/${encodeURIComponent(w.name)}`;
  } catch (error) {
    w.error = error;
    // Refused: the next try may be about something else. Where the answer was lost, the same order may have been carried
    // out, and its key finds that out.
    if (error.status >= 400 && error.status < 500) w.key = newKey();
  }
  w.sending = false;
  draw();
}

export const actions = {
  wizardTest: (_target, _event, state, draw) => test(state.wizard, draw),
  wizardBack: (_target, _event, state, draw) => go(state.wizard, -1, draw),
  wizardNext: (_target, _event, state, draw) => {
    const w = state.wizard;
    w.error = wrong(w);
    if (w.error) {
      draw();
      const field = w.error.field && document.getElementById(w.error.field);
      if (field) field.focus();
    } else if (w.step === STEPS.length - 1) {
      start(w, draw);
    } else {
      go(w, 1, draw);
      // The next step offers the databases, so they are asked for if nobody has yet.
      if (w.step === 1 && !w.check) test(w, draw);
    }
  },
  field: (target, event, state, draw) => {
    const w = state.wizard;
    const field = target.dataset.field;
    if (field === 'filter') {
      state.detail.filter = target.value;
    } else if (field === 'name') {
      w.name = target.value.trim();
    } else if (event.type === 'change') {
      if (field === 'which') w.all = target.value === 'all';
      else if (field === 'database') target.checked ? w.databases.add(target.value) : w.databases.delete(target.value);
      else if (field === 'overwrite' || field === 'whenReady') w[field] = target.checked;
      else w[field] = target.value;
    }
    if (field === 'filter' || event.type === 'change') draw();
  },
};

function go(w, by, draw) {
  w.step += by;
  w.error = null;
  draw();
  document.getElementById('step-title').focus();
}
