// The cutover panel: rehearse, switch, and what may follow, as far as this daemon can.

import { ask, knows, of, post } from './api.js';
import { phases } from './chart.js';
import { bytes, h, number, seconds } from './dom.js';

const PHASES = ['prepare', 'pause', 'drain', 'decide', 'switch'];
const WORDS = {
  prepare: 'Everything is made ready; nobody waits',
  pause: 'New transactions wait',
  drain: 'The last transactions end and are applied',
  decide: 'The decision is made durable',
  switch: 'Sessions go on, on the other server',
};
/** What the limits of an order are called in it. */
const LIMITS = [['max_pause', 'max-pause', 'Longest pause', 'From the moment new transactions wait, such as 5s.'], ['drain_timeout', 'drain-timeout', 'Time to drain', 'For running transactions to end, such as 3s.']];
/** Calls that not every daemon has. */
const FURTHER = ['rollback', 'complete', 'verify'];

/** Finds out once what the daemon can do. */
export async function learn(state) {
  if (state.can) return;
  const known = await Promise.all(FURTHER.map((call) => knows(`/api/v1/migrations/{name}/${call}`)));
  state.can = Object.fromEntries(FURTHER.map((call, index) => [call, known[index]]));
}

export function panel(m, state) {
  const run = state.live.cutovers[m.name];
  const running = (run && run.outcome === 'running') || ['CompletingMigration', 'RollingBack'].includes(m.substate) || state.detail.cuttingOver;
  return h('section', { class: 'card', 'aria-labelledby': 'cutover' }, h('h2', { id: 'cutover' }, 'Cutover'),
    running ? going(run) : ready(m, state), !running && run && run.outcome !== 'running' ? report(run) : null);
}

function ready(m, state) {
  if (m.option === 'validate') {
    return h('p', { class: 'muted' }, 'A validation changes nothing: the databases run where they ran.');
  }
  if (m.mode === 'offline') return copied(m, state);
  if (m.state === 'Succeeded') return after(m, state);
  if (m.state !== 'WaitingForUserAction') {
    return h('p', { class: 'muted' }, m.state === 'InProgress' ? 'It can be cut over once everything is copied and the target follows.' : 'This migration cannot be cut over.');
  }
  return [
    h('p', {}, 'Everything is copied, and the target follows every change. A cutover holds new transactions for a moment and lets them go on there.'),
    notices(m, state),
    h('div', { class: 'actions' },
      h('button', { type: 'button', id: 'dry-run', 'data-act': 'dryRun' }, 'Dry run'),
      h('button', { type: 'button', id: 'cut-over', class: 'primary', 'data-act': 'cutOver' }, 'Cut over …'),
      state.can && state.can.verify ? h('button', { type: 'button', id: 'verify', 'data-act': 'verify' }, 'Verify') : null),
    limits(),
  ];
}

/** One that was copied keeps its databases from the next migration until it is completed. */
function copied(m, state) {
  const ended = m.substate === 'Completed';
  const can = state.can || {};
  return [
    h('p', { class: 'muted' }, 'An offline migration is a copy: there is nothing to cut over.'),
    ended ? h('div', { class: 'actions' },
      can.complete ? h('button', { type: 'button', id: 'complete', 'data-act': 'complete' }, 'Complete …') : null,
      can.verify ? h('button', { type: 'button', id: 'verify', 'data-act': 'verify' }, 'Verify') : null) : null,
  ];
}

/** In a place of its own, so that what stands below is not made anew when one comes or goes, and keeps what was typed. */
function notices(m, state) {
  const count = state.detail.blockers ? state.detail.blockers.length : null;
  return h('div', {},
    m.cutover_when_ready ? h('p', { class: 'notice' }, 'It cuts over by itself as soon as it can.') : null,
    count ? h('p', { class: 'notice warn' }, `${number(count)} sessions are in the way now: `, h('a', { href: `#/m/${encodeURIComponent(m.name)}/sessions` }, 'see which')) : null);
}

/** Before a cutover is ordered; `null`: the server could not be asked. */
function inTheWay(blockers) {
  if (!blockers) return h('p', { class: 'notice warn' }, 'What stands in the way could not be found out.');
  if (!blockers.length) return null;
  return h('p', { class: 'notice warn' }, `${number(blockers.length)} sessions are in the way now; it may be aborted, and then nothing has changed.`);
}

/** What an order may say of itself; what is left empty is as configured. */
function limits() {
  return h('details', { id: 'limits' }, h('summary', {}, 'Time limits, stragglers and force'),
    LIMITS.map(([, id, label, hint]) => h('div', { class: 'field' },
      h('label', { for: id }, label), h('p', { class: 'hint', id: `${id}-hint` }, `${hint} Empty: as configured.`),
      h('input', { id, type: 'text', autocomplete: 'off', spellcheck: 'false', placeholder: 'as configured', 'aria-describedby': `${id}-hint` }))),
    h('div', { class: 'field' },
      h('label', { for: 'stragglers' }, 'Stragglers'), h('p', { class: 'hint', id: 'stragglers-hint' }, 'What happens to transactions that outlast it.'),
      h('select', { id: 'stragglers', 'aria-describedby': 'stragglers-hint' },
        h('option', { value: '' }, 'As configured'), h('option', { value: 'abort' }, 'Give up; nothing has changed'), h('option', { value: 'terminate' }, 'End their sessions'))),
    h('div', { class: 'field' },
      h('label', { for: 'force' }, h('input', { id: 'force', type: 'checkbox', 'aria-describedby': 'force-hint' }), ' Force'),
      h('p', { class: 'hint', id: 'force-hint' }, 'Go past what can cost time or connections: a target that is far behind, much to carry in the pause, too few connections, or owners and grants that it lacks. What guards data is never passed.')));
}

/** An order's body: what was typed into the limits, and `more`. */
function request(more = {}) {
  const typed = [...LIMITS.map(([key, id]) => [key, id]), ['stragglers', 'stragglers']].map(([key, id]) => {
    const field = document.getElementById(id);
    return [key, field ? field.value.trim() : ''];
  });
  const force = document.getElementById('force');
  return { ...Object.fromEntries(typed.filter(([, value]) => value)), ...(force && force.checked ? { force: true } : {}), ...more };
}

function after(m, state) {
  const known = state.can || {};
  const open = m.substate === 'Completed' && m.databases.every((database) => database.rollback_possible !== false);
  const can = { ...known, rollback: known.rollback && open, complete: known.complete && m.substate === 'Completed' };
  return [
    h('p', {}, 'The databases run on the target.'),
    can.rollback ? h('p', { class: 'muted' }, 'Until it is completed, every change is also brought back to the source, so that the way back is open.')
      : h('p', { class: 'muted' }, known.rollback ? 'There is no way back to the source any more.' : 'This version of pgcutover cannot roll back: changes made on the target are not brought to the source.'),
    h('div', { class: 'actions' },
      can.rollback ? h('button', { type: 'button', id: 'dry-run', 'data-act': 'dryRunBack' }, 'Dry run of a rollback') : null,
      can.rollback ? h('button', { type: 'button', id: 'roll-back', class: 'danger', 'data-act': 'rollBack' }, 'Roll back …') : null,
      can.complete ? h('button', { type: 'button', id: 'complete', 'data-act': 'complete' }, 'Complete …') : null,
      can.verify ? h('button', { type: 'button', id: 'verify', 'data-act': 'verify' }, 'Verify') : null),
    can.rollback ? limits() : null,
  ];
}

function going(run) {
  const at = run ? PHASES.indexOf(run.phase) : -1;
  return h('div', { role: 'status' }, h('ol', { class: 'steps', 'aria-label': 'Phases of the cutover' }, PHASES.map((phase, index) =>
    h('li', { class: index < at ? 'done' : index === at ? 'now' : null, 'aria-current': index === at ? 'step' : null, title: WORDS[phase] }, phase))),
  h('p', { class: 'muted' }, at < 0 ? 'It has been ordered …' : WORDS[PHASES[at]]));
}

function report(run) {
  const lengths = PHASES.map((phase) => [phase, run.phases_ms[phase]]);
  const waited = `transactions waited ${number(run.pause_ms)} ms`;
  const back = run.direction === 'reverse';
  const [kind, words] = {
    switched: back ? ['', `Rolled back to the source: ${waited}.`] : ['good', `Switched to the target: ${waited}.`],
    'dry-run': run.reason ? ['warn', `A ${back ? 'rollback' : 'cutover'} would not have switched now: ${run.reason}`] : ['good', `Dry run of a ${back ? 'rollback' : 'cutover'}: ${waited}, and went on where they were.`],
    aborted: ['bad', `The ${back ? 'rollback' : 'cutover'} was aborted, and everything goes on where it was: ${run.reason}`],
  }[run.outcome] || ['', run.outcome];
  const steps = [...run.prepare_steps, ...run.pause_steps];
  return h('div', { id: 'report' },
    h('p', {}), h('div', { class: `notice ${kind}`, role: 'status' }, h('p', {}, words), run.hint ? h('p', {}, run.hint) : null),
    lengths.some(([, length]) => length > 0) ? phases(lengths) : null,
    h('p', {}),
    h('dl', { class: 'facts' },
      h('dt', {}, 'Sessions that waited'), h('dd', {}, run.sessions_held ? `${number(run.sessions_held)}, the longest ${number(run.longest_hold_ms)} ms` : '0'),
      h('dt', {}, 'Sessions moved'), h('dd', {}, number(run.sessions_moved)), h('dt', {}, 'Sessions ended'), h('dd', {}, number(run.sessions_ended))),
    run.would.length ? [h('h3', {}, 'What it would do'), h('ul', { id: 'would' }, run.would.map((one) => h('li', {}, `${one.action.replaceAll('-', ' ')}${one.database ? ` ${one.database}` : ''}: ${one.detail}`)))] : null,
    steps.length ? h('details', { id: 'step-times' }, h('summary', {}, 'Time of each step'), h('ul', {}, steps.map((one) => h('li', {}, `${one.step}: ${number(one.ms)} ms`)))) : null,
    run.blockers.length ? [h('h3', {}, 'What stood in the way'), h('ul', {}, run.blockers.map((item) => h('li', {}, item)))] : null,
    run.forced.length ? [h('h3', {}, 'Gone past by force'), h('ul', { id: 'forced' }, run.forced.map((item) => h('li', {}, item)))] : null,
    run.notes.length ? [h('h3', {}, 'Notes'), h('ul', {}, run.notes.map((item) => h('li', {}, item)))] : null);
}

/** How much the target has yet to take. */
function pending(m) {
  return h('dl', { class: 'facts', id: 'pending' }, m.databases.flatMap((d) => [
    h('dt', {}, d.name),
    h('dd', {}, `${number(d.pending_changes)} pending changes, ${bytes(d.latency_bytes)} behind (${seconds(d.latency_seconds)})`),
  ]));
}

/** What is done on a click; `order` does it and shows a refusal. */
export function actions(order) {
  const current = (state) => state.live.migrations.find((m) => m.name === state.route.name);
  const run = async (state, draw, note, call) => {
    state.detail.cuttingOver = true;
    draw();
    await order(state, draw, note, call);
    state.detail.cuttingOver = false;
    draw();
  };
  const path = (state, rest) => of(state.route.name, rest);
  const back = (answer) => ({ switched: 'The databases run on the source again.', aborted: 'The rollback was aborted; nothing has changed.' }[answer.outcome] || answer.outcome);
  const ended = (answer) => ({ switched: 'The databases run on the target.', 'dry-run': 'The dry run has ended.', aborted: 'The cutover was aborted; nothing has changed.' }[answer.outcome] || answer.outcome);
  return {
    dryRun: (_target, _event, state, draw) => {
      const body = request({ dry_run: true });
      return run(state, draw, ended, () => post(path(state, '/cutover'), body));
    },
    dryRunBack: (_target, _event, state, draw) => {
      const body = request({ dry_run: true });
      return run(state, draw, ended, () => post(path(state, '/rollback'), body));
    },
    cutOver: async (_target, _event, state, draw) => {
      const body = request();
      const blockers = state.detail.blockers;
      const sure = await ask({
        title: `Cut over ${state.route.name}?`, good: 'Cut over now', danger: true,
        body: [
          h('p', {}, `From ${state.live.source} to ${state.live.target}. New transactions wait until the target has everything:`),
          pending(current(state)),
          inTheWay(blockers),
          h('p', { class: 'muted' }, state.can && state.can.rollback ? 'You can roll back until you complete the migration.' : 'There is no way back by command afterwards.'),
        ],
      });
      if (sure) run(state, draw, ended, () => post(path(state, '/cutover'), body));
    },
    rollBack: async (_target, _event, state, draw) => {
      const body = request();
      const sure = await ask({ title: `Roll back ${state.route.name}?`, good: 'Roll back now', danger: true, body: [h('p', {}, `The databases go back to ${state.live.source}, with everything that was written since.`), pending(current(state))] });
      if (sure) run(state, draw, back, () => post(path(state, '/rollback'), body));
    },
    complete: async (_target, _event, state, draw) => {
      const what = current(state).mode === 'offline' ? 'The copy stays. What pgcutover has put on both servers is removed, and the databases are free for the next migration.'
        : 'The way back is closed: what brings changes back to the source is removed.';
      const sure = await ask({ title: `Complete ${state.route.name}?`, good: 'Complete', danger: true, body: h('p', {}, what) });
      if (sure) order(state, draw, 'Completed.', () => post(path(state, '/complete')));
    },
  };
}
