// One migration: its databases and tables, validation, charts, sessions, what has happened, and the way to its end.

import { ask, get, of, post, remove } from './api.js';
import { chart, rates } from './chart.js';
import * as cutover from './cutover.js';
import { bytes, h, number, pill, say, seconds, table, time } from './dom.js';
import * as mend from './mend.js';

export const TABS = [['overview', 'Overview'], ['tables', 'Tables'], ['validation', 'Validation'], ['sessions', 'Sessions'], ['events', 'Events']];

const STEPS = [
  ['Prepare', 'PerformingPreRequisiteSteps'], ['Validate', 'ValidationInProgress'], ['Copy', 'MigratingData'],
  ['Ready', 'WaitingForCutoverTrigger'], ['Cut over', 'CompletingMigration'], ['Completed', 'Completed'],
];

export function migrationOf(state) {
  return ((state.live && state.live.migrations) || []).find((m) => m.name === state.route.name);
}

export function draw(state) {
  const m = migrationOf(state);
  if (!state.live) return h('p', { class: 'muted' }, 'Loading …');
  if (!m) return [h('h1', {}, state.route.name), h('p', {}, 'There is no migration of this name. ', h('a', { href: '#/' }, 'All migrations'))];
  const { tab } = state.route;
  return [
    h('p', { class: 'small' }, h('a', { href: '#/' }, '← Migrations')),
    h('div', { class: 'head' }, h('h1', {}, m.name), pill(m),
      h('div', { class: 'actions' },
        ['Failed', 'ValidationFailed'].includes(m.state) ? h('button', { type: 'button', id: 'retry', class: 'primary', 'data-act': 'retry' }, 'Retry') : null,
        ['InProgress', 'WaitingForUserAction', 'Failed', 'ValidationFailed'].includes(m.state) ? h('button', { type: 'button', id: 'cancel', class: 'danger', 'data-act': 'cancel' }, 'Cancel migration') : null)),
    steps(m), refused(state), problem(m),
    h('div', { class: 'tabs', role: 'tablist', 'aria-label': 'Parts of the migration' }, TABS.map(([id, label]) =>
      h('button', { type: 'button', role: 'tab', id: `tab-${id}`, 'data-act': 'tab', 'data-tab': id, 'aria-selected': String(id === tab), 'aria-controls': 'panel', tabindex: id === tab ? '0' : '-1' }, label))),
    h('div', { role: 'tabpanel', id: 'panel', 'aria-labelledby': `tab-${tab}` }, { overview, tables, validation, sessions, events }[tab](m, state)),
  ];
}

/** A validation ends before anything is copied, and what is only copied is never cut over. */
function stepsOf(m) {
  if (m.option === 'validate') return STEPS.filter(([label]) => !['Copy', 'Ready', 'Cut over'].includes(label));
  return m.mode === 'offline' ? STEPS.filter(([label]) => !['Ready', 'Cut over'].includes(label)) : STEPS;
}

function steps(m) {
  const all = stepsOf(m);
  const back = m.substate === 'RollingBack';
  const now = back ? 'CompletingMigration' : m.substate;
  const at = m.state === 'Succeeded' ? all.length : all.findIndex(([, substate]) => substate === now);
  const failed = m.state.endsWith('Failed');
  const reached = at < 0 ? (m.state === 'ValidationFailed' ? 1 : m.databases.some((d) => d.tables_ready > 0) ? 2 : 0) : at;
  return h('ol', { class: 'steps', 'aria-label': 'Steps of the migration' }, all.map(([label], index) =>
    h('li', { class: index < reached ? 'done' : index === reached ? (failed ? 'failed' : m.state === 'Cancelled' ? null : 'now') : null, 'aria-current': index === reached ? 'step' : null }, back && index === reached ? 'Roll back' : label)));
}

function problem(m) {
  if (!m.error) return null;
  return h('div', { class: 'notice bad', role: 'alert' },
    h('p', {}, h('b', {}, m.error.message), m.error.object ? ` (${m.error.object})` : ''),
    m.error.hint ? h('pre', {}, m.error.hint) : null);
}

function refused(state) {
  const { error, note } = state.detail;
  if (!error && !note) return null;
  return h('div', { class: `notice ${error ? 'bad' : 'good'}`, role: 'status' }, h('p', {}, error ? error.message : note), error && error.hint ? h('p', {}, error.hint) : null);
}

function overview(m, state) {
  const history = state.detail.history || [];
  const sum = (key) => (m.databases.length && m.databases.every((d) => d[key] !== null) ? m.databases.reduce((all, d) => all + d[key], 0) : null);
  const moments = byMoment(history);
  const worst = (key) => moments.map(({ at, samples }) => ({ at, value: samples.some((one) => one[key] === null) ? null : Math.max(...samples.map((one) => one[key])) }));
  const copied = moments.map(({ at, samples }) => ({ at, value: samples[0].copied_bytes }));
  return [
    h('div', { class: 'grid' },
      h('section', { class: 'card', 'aria-labelledby': 'about' }, h('h2', { id: 'about' }, 'Migration'),
        h('dl', { class: 'facts' },
          h('dt', {}, 'State'), h('dd', {}, `${m.state}, ${m.substate}`),
          h('dt', {}, 'From'), h('dd', {}, `${m.source} (${m.source_server_type})`),
          h('dt', {}, 'To'), h('dd', {}, state.live.target),
          h('dt', {}, 'Mode'), h('dd', {}, `${m.mode}, ${m.option.replaceAll('-', ' ')}`),
          h('dt', {}, 'Started'), h('dd', {}, time(m.started_at)),
          h('dt', {}, 'Duration'), h('dd', {}, seconds(m.finished_at ? m.duration_seconds : Math.max(0, state.live.at - m.started_at)))),
        h('div', { class: 'figures' },
          figure('Latency', over(m) && sum('latency_bytes') === null ? '–' : bytes(sum('latency_bytes'))), figure('Pending changes', over(m) && sum('pending_changes') === null ? '–' : number(sum('pending_changes'))))),
      cutover.panel(m, state)),
    mend.panel(m, state),
    mend.shadow(state),
    h('section', { class: 'card', 'aria-labelledby': 'dbs' }, h('h2', { id: 'dbs' }, 'Databases'), databases(m)),
    fence(m),
    h('div', { class: 'grid' },
      drawn('Latency in seconds', worst('latency_seconds'), seconds),
      drawn('Latency in bytes', worst('latency_bytes'), bytes),
      drawn('Copy throughput, all migrations', rates(copied), (value) => `${bytes(value)}/s`)),
  ];
}

function drawn(title, points, words) {
  return h('section', { class: 'card' }, h('h2', {}, title), chart(title, points, words));
}

/** Samples of the same moment, of every database. */
function byMoment(history) {
  const moments = new Map();
  for (const sample of history) moments.set(sample.at, [...(moments.get(sample.at) || []), sample]);
  return [...moments].map(([at, samples]) => ({ at, samples }));
}

/** Whether there is nothing to be behind of: a copy, or what has ended. */
function over(m) {
  return m.mode === 'offline' || ['Succeeded', 'Cancelled'].includes(m.state);
}

function figure(label, value) {
  return h('div', { class: 'figure' }, h('b', {}, value), h('span', {}, label));
}

function databases(m) {
  return m.databases.length ? table('Databases of the migration', [
    { label: 'Database', cell: (d) => d.name },
    { label: 'State', cell: (d) => [d.state, d.last_error ? h('p', { class: 'error' }, `${d.retries} tries: ${d.last_error}`) : null] },
    { label: 'Tables ready', cell: (d) => [`${number(d.tables_ready)} of ${number(d.tables_total)}`, h('progress', { max: d.tables_total || 1, value: d.tables_ready, 'aria-label': `Tables of ${d.name} that are ready` })] },
    { label: 'Latency', class: 'num', cell: (d) => (over(m) && d.latency_bytes === null ? '–' : bytes(d.latency_bytes)) },
    { label: 'In time', class: 'num', cell: (d) => (over(m) && d.latency_seconds === null ? '–' : seconds(d.latency_seconds)) },
    { label: 'Pending changes', class: 'num', cell: (d) => (over(m) && d.pending_changes === null ? '–' : number(d.pending_changes)) },
  ], m.databases) : h('p', { class: 'muted' }, 'Not known yet.');
}

/** What was written past a fence, and whether somebody looks; nothing before a server was left. */
function fence(m) {
  const unwatched = m.databases.filter((d) => d.fence_watch?.trouble);
  const written = m.databases.flatMap((d) => (d.fenced_writes ?? []).map((w) => ({ ...w, database: d.name })));
  if (!unwatched.length && !written.length) return null;
  return h('section', { class: 'card', 'aria-label': 'Writes past the fence' }, h('h2', {}, 'Writes past the fence'),
    unwatched.map((d) => h('p', { class: 'error' }, `${d.name}: writes on the fenced ${d.fence_watch.server} are not watched for: ${d.fence_watch.trouble}`)),
    written.length ? [
      h('p', { class: 'error' }, 'Somebody got past the fence. These rows are on the server that was left, and not on the one in use.'),
      table('Writes past the fence', [
        { label: 'Server', cell: (w) => w.server }, { label: 'Database', cell: (w) => w.database },
        { label: 'Table', cell: (w) => `${w.schema}.${w.table}` }, { label: 'Kind', cell: (w) => w.kind },
        { label: 'Changes', class: 'num', cell: (w) => number(w.changes) },
        { label: 'First', class: 'nowrap', cell: (w) => time(w.first_at) }, { label: 'Last', class: 'nowrap', cell: (w) => time(w.last_at) },
      ], written)] : null);
}

function tables(m, state) {
  const all = state.detail.tables;
  if (!all) return h('p', { class: 'muted' }, 'Loading …');
  const filter = (state.detail.filter || '').toLowerCase();
  const shown = all.filter((t) => `${t.database}.${t.schema}.${t.name}`.toLowerCase().includes(filter));
  const part = (t) => (t.full_load.bytes_total ? Math.min(t.full_load.bytes, t.full_load.bytes_total) : t.full_load.state === 'ready' ? 1 : 0);
  return h('section', { class: 'card' },
    h('div', { class: 'field' }, h('label', { for: 'filter' }, 'Filter'), h('input', { id: 'filter', type: 'search', 'data-field': 'filter', autocomplete: 'off' }),
      h('p', { class: 'hint', role: 'status' }, `${number(shown.length)} of ${number(all.length)} tables`)),
    table('Tables: full load and incremental sync', [
      { label: 'Table', cell: (t) => [`${t.schema}.${t.name}`, t.error ? h('p', { class: 'error' }, t.error.message) : null] },
      { label: 'Database', cell: (t) => t.database },
      { label: 'Full load', cell: (t) => [t.full_load.state, t.full_load.state === 'copying' ? [h('progress', { max: t.full_load.bytes_total || 1, value: part(t), 'aria-label': `Full load of ${t.schema}.${t.name}` }), speed(t.full_load)] : null] },
      { label: 'Rows', class: 'num', cell: (t) => number(t.full_load.rows) },
      { label: 'Size', class: 'num', cell: (t) => bytes(t.full_load.bytes) },
      { label: 'Indexes', cell: (t) => t.indexes },
      { label: 'Inserts', class: 'num', cell: (t) => number(t.incremental_sync.inserts) },
      { label: 'Updates', class: 'num', cell: (t) => number(t.incremental_sync.updates) },
      { label: 'Deletes', class: 'num', cell: (t) => number(t.incremental_sync.deletes) },
      { label: 'Pending', class: 'num', cell: (t) => number(t.incremental_sync.pending) },
      { label: 'Verification', cell: (t) => t.verification || '–' },
    ], shown.slice(0, 500)),
    shown.length > 500 ? h('p', { class: 'muted' }, 'The first 500 are shown: filter to see others.') : null);
}

/** How fast a table is copied, and for how long still, as far as that is known. */
function speed({ bytes_per_second: rate, seconds_left: left }) {
  if (rate === null || rate === undefined) return null;
  return h('p', { class: 'muted small' }, `${bytes(rate)}/s${left === null || left === undefined ? '' : `, ${seconds(left)} left`}`);
}

function validation(_m, state) {
  const rules = state.detail.validation;
  if (!rules) return h('p', { class: 'muted' }, 'Loading …');
  if (!rules.length) return h('div', { class: 'card' }, h('p', { class: 'muted' }, 'It has no validation: none was asked for, or it has not ended yet.'));
  const levels = new Map();
  for (const rule of rules) {
    const place = rule.level === 'instance' ? 'Instance' : `Database ${rule.level.database}`;
    levels.set(place, [...(levels.get(place) || []), rule]);
  }
  const order = { Failed: 0, Warning: 1, Succeeded: 2 };
  const kind = { Failed: 'bad', Warning: 'warn', Succeeded: 'good' };
  return [...levels].map(([place, list]) => {
    const open = list.filter((rule) => rule.outcome !== 'Succeeded').sort((a, b) => order[a.outcome] - order[b.outcome]);
    const passed = list.filter((rule) => rule.outcome === 'Succeeded');
    return h('section', { class: 'card' }, h('h2', {}, place),
      open.map((rule) => h('div', { class: 'rule' },
        h('div', {}, h('span', { class: `pill ${kind[rule.outcome]}` }, rule.outcome), ' ', h('b', {}, rule.code)),
        h('ul', {}, rule.evidence.map((item) => h('li', {}, item))),
        rule.evidence_total > rule.evidence.length ? h('p', { class: 'muted' }, `and ${number(rule.evidence_total - rule.evidence.length)} more`) : null,
        h('p', { class: 'muted' }, rule.why), rule.fix ? h('pre', {}, rule.fix) : null, mend.fixButton(rule))),
      passed.length ? h('details', {}, h('summary', {}, `${passed.length} rules succeeded`),
        h('ul', {}, passed.map((rule) => h('li', {}, `${rule.code}: ${rule.evidence.join('; ') || 'as it should be'}`)))) : null);
  });
}

function sessions(m, state) {
  const { clients, blockers } = state.detail;
  const own = new Set(m.databases.map((d) => d.name));
  const shown = (clients || []).filter((c) => own.has(c.database));
  return [
    h('section', { class: 'card' }, h('h2', {}, 'In the way of a cutover'),
      blockers === undefined ? h('p', { class: 'muted' }, 'Loading …')
        : blockers === null ? h('p', {}, 'Could not be found out: the source cannot be asked.')
          : blockers.length === 0 ? h('p', { class: 'muted' }, 'Nothing: every session can be moved.')
            : table('What would keep a cutover from moving every session', [
              { label: 'Database', cell: (b) => b.database }, { label: 'Process', class: 'num', cell: (b) => b.pid ?? '–' },
              { label: 'User', cell: (b) => b.user || '–' }, { label: 'Application', cell: (b) => b.application_name || '–' },
              { label: 'What', cell: (b) => [b.reason, b.hint ? h('p', { class: 'muted' }, b.hint) : null] },
              { label: '', cell: (b) => (b.pid ? h('button', { type: 'button', 'data-act': 'end', 'data-pid': b.pid }, 'End') : '') },
            ], blockers)),
    h('section', { class: 'card' }, h('h2', {}, 'Sessions'),
      clients && !shown.length ? h('p', { class: 'muted' }, 'No client is connected to these databases.')
        : table('Client sessions', [
          { label: 'Database', cell: (c) => c.database }, { label: 'User', cell: (c) => c.user },
          { label: 'Client', cell: (c) => (c.addr ? `${c.addr}${c.port ? `:${c.port}` : ''}` : '–') }, { label: 'Application', cell: (c) => c.application_name || '–' },
          { label: 'State', cell: (c) => c.state }, { label: 'Process', class: 'num', cell: (c) => c.remote_pid ?? '–' },
        ], shown.slice(0, 200))),
  ];
}

function events(m, state) {
  const all = state.detail.events;
  if (!all) return h('p', { class: 'muted' }, 'Loading …');
  const own = new Set(m.databases.map((d) => d.name));
  const shown = all.filter((e) => e.migration === m.name || (e.kind === 'route' && [...own].some((name) => e.text.startsWith(`database ${name} `))));
  return h('section', { class: 'card' }, h('h2', {}, 'What has happened'),
    h('p', { class: 'muted small' }, 'Since this daemon began, newest first.'),
    table('Events', [
      { label: 'Time', class: 'nowrap', cell: (e) => time(e.at) },
      { label: 'Kind', cell: (e) => h('span', { class: `pill ${e.failed ? 'bad' : ''}` }, e.kind) },
      { label: 'What', cell: (e) => e.text },
    ], shown));
}

/** Asks for what the tab shows and the live state does not bring. */
export async function refresh(state, draw) {
  const { name, tab } = state.route;
  const kept = state.detail;
  const into = async (key, path) => {
    try {
      kept[key] = await get(path);
    } catch (error) {
      kept[key] = key === 'blockers' ? null : kept[key] ?? (['verified', 'shadow'].includes(key) ? null : []);
    }
  };
  const wanted = {
    overview: [['history', of(name, '/history')], ['blockers', '/api/v1/blockers'], ['verified', of(name, '/verification')], ['shadow', of(name, '/shadow')]],
    tables: [['tables', of(name, '/tables')]],
    validation: [['validation', of(name, '/validation')]],
    sessions: [['clients', '/api/v1/clients'], ['blockers', '/api/v1/blockers']],
    events: [['events', '/api/v1/events']],
  }[tab];
  await Promise.all([cutover.learn(state), ...wanted.map(([key, path]) => into(key, path))]);
  if (state.detail === kept) draw();
}

/** The live state has changed. */
export function changed(state, was, draw) {
  if (was && was.newest_event !== state.live.newest_event) refresh(state, draw);
}

/** Does what was confirmed, and shows why it was refused. */
async function order(state, draw, note, call) {
  state.detail.error = null;
  state.detail.note = null;
  try {
    const answer = await call();
    state.detail.note = typeof note === 'function' ? note(answer) : note;
    say(state.detail.note);
  } catch (error) {
    state.detail.error = error;
  }
  draw();
}

export const actions = {
  tab: (target, _event, state) => { location.hash = `#/m/${encodeURIComponent(state.route.name)}/${target.dataset.tab}`; },
  retry: (_target, _event, state, draw) => order(state, draw, 'It goes on.', () => post(of(state.route.name, '/retry'))),
  cancel: async (_target, _event, state, draw) => {
    const sure = await ask({
      title: `Cancel ${state.route.name}?`, good: 'Cancel migration', danger: true,
      body: h('p', {}, 'What it has made on both servers is removed: slots, publications and the like. The rows that were copied to the target stay there. Applications go on, on the source.'),
    });
    const told = (report) => `Cancelled: ${report.removed.length} objects removed, ${report.left.length} left.`;
    if (sure) order(state, draw, told, () => post(of(state.route.name, '/cancel')));
  },
  end: async (target, _event, state, draw) => {
    const { pid } = target.dataset;
    const sure = await ask({ title: `End session ${pid}?`, good: 'End it', danger: true, body: h('p', {}, 'Its client gets error 57P01, and its transaction is rolled back.') });
    if (sure) order(state, draw, `Session ${pid} was ended.`, () => remove(`/api/v1/sessions/${encodeURIComponent(pid)}`));
  },
  ...cutover.actions(order),
  ...mend.actions(order),
};
