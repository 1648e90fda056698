// What puts right what was found: the fix of a rule of the validation, and the repair of rows that differ. Everything is
// shown before it is done.

import { ask, of, post } from './api.js';
import { h, number, seconds } from './dom.js';

/** The button beside a rule; none where nothing can be run. */
export function fixButton(rule) {
  return (rule.statements || []).length
    ? h('div', { class: 'actions' }, h('button', { type: 'button', 'data-act': 'fix', 'data-rule': rule.code, 'aria-label': `Fix ${rule.code}` }, 'Fix …'))
    : null;
}

/** How far a verification is, and what the last one has found. */
export function panel(m, state) {
  const report = state.detail.verified;
  if (!m.verification && !report) return null;
  return h('section', { class: 'card', 'aria-labelledby': 'verification' }, h('h2', { id: 'verification' }, 'Verification'),
    m.verification ? going(m.verification) : found(report));
}

/** What reads that also ran on the target have found; nothing where none were ordered. */
export function shadow(state) {
  const view = state.detail.shadow;
  if (!view) return null;
  const counts = (of) => Object.entries(of).filter(([, count]) => count > 0).map(([name, count]) => `${number(count)} ${name.replaceAll('_', ' ')}`).join(', ') || 'none';
  const latency = (ms) => (ms ? `p50 ${ms.p50.toFixed(2)} ms, p95 ${ms.p95.toFixed(2)} ms, p99 ${ms.p99.toFixed(2)} ms` : '–');
  const wrong = view.statements.filter((one) => one.different > 0 || Object.keys(one.failed).length > 0);
  return h('section', { class: 'card', 'aria-labelledby': 'shadow' }, h('h2', { id: 'shadow' }, 'Shadow reads'),
    h('dl', { class: 'facts' },
      h('dt', {}, 'State'), h('dd', {}, view.running ? `${view.share} % of the transactions, ${seconds(view.seconds_left)} left` : `ended: ${view.ended}`),
      h('dt', {}, 'Sampled'), h('dd', {}, number(view.sampled)),
      h('dt', {}, 'Answers'), h('dd', {}, counts(view.outcomes)),
      h('dt', {}, 'Not run'), h('dd', {}, counts(view.skipped)),
      h('dt', {}, 'Source'), h('dd', {}, latency(view.source_ms)),
      h('dt', {}, 'Target'), h('dd', {}, latency(view.target_ms))),
    wrong.length ? h('ul', {}, wrong.map((one) => h('li', {}, `${number(one.different)} different, failed: ${counts(one.failed)}: `, h('code', {}, one.statement)))) : null);
}

function going(at) {
  const share = at.bytes_total ? Math.min(at.bytes_compared, at.bytes_total) : at.tables_compared;
  return h('div', { role: 'status' },
    h('progress', { max: at.bytes_total || at.tables_total || 1, value: share, 'aria-label': 'Verification' }),
    h('p', { class: 'muted' }, `${number(at.tables_compared)} of ${number(at.tables_total)} tables, ${number(at.rows_compared)} rows, ${number(at.differences)} differences so far`,
      at.eta_seconds === null ? '' : `; ${seconds(at.eta_seconds)} left`));
}

function found(report) {
  const rows = report.tables.filter((t) => t.differences > 0);
  const unread = report.tables.filter((t) => t.problem);
  const definitions = report.definitions.flatMap((d) => d.definitions.map((one) => ({ database: d.database, ...one })));
  return h('div', { id: 'differences' },
    h('div', { class: `notice ${report.differences ? 'bad' : 'good'}` }, h('p', {}, `${number(report.tables_compared)} tables, ${number(report.rows_compared)} rows compared: ${number(report.differences)} differences${report.repaired ? `, ${number(report.repaired)} rows repaired` : ''}.`)),
    rows.map((t) => h('details', { open: rows.length === 1 },
      h('summary', {}, `${t.database}: ${t.schema}.${t.name}, ${number(t.differences)} ${t.differences === 1 ? 'row' : 'rows'}`),
      h('ul', {}, t.listed.map((row) => h('li', {}, `${row.kind} (${row.key.map((part) => part ?? 'NULL').join(', ')})`))),
      t.differences > t.listed.length ? h('p', { class: 'muted' }, `and ${number(t.differences - t.listed.length)} more`) : null)),
    unread.length ? [h('h3', {}, 'Not compared'), h('ul', {}, unread.map((t) => h('li', {}, `${t.database}: ${t.schema}.${t.name}: ${t.problem}`)))] : null,
    definitions.length ? [h('h3', {}, 'Definitions'), h('ul', {}, definitions.map((d) => h('li', {}, `${d.database}: ${d.kind} ${d.name}: ${d.difference}`)))] : null,
    rows.length ? h('div', { class: 'actions' }, h('button', { type: 'button', id: 'repair', class: 'danger', 'data-act': 'repair' }, 'Repair …')) : null);
}

const counted = (report) => `${number(report.tables_compared)} tables, ${number(report.rows_compared)} rows, ${number(report.differences)} differences.`;

/** What is done on a click; `order` does it and shows a refusal. */
export function actions(order) {
  const kept = async (state, call) => {
    const { detail } = state;
    detail.verified = null;
    detail.verified = await call();
    return detail.verified;
  };
  return {
    verify: (_target, _event, state, draw) => order(state, draw, (report) => `Verified: ${counted(report)}`, () => kept(state, () => post(of(state.route.name, '/verify')))),
    repair: async (_target, _event, state, draw) => {
      const rows = state.detail.verified.tables.filter((t) => t.differences > 0);
      const sure = await ask({
        title: 'Repair what differs?', good: 'Repair', danger: true,
        body: [
          h('p', {}, 'These rows of the server in use are written over those of the other one, at moments in which the stream stands between them. Keys and counts are journalled first.'),
          h('ul', { id: 'to-repair' }, rows.map((t) => h('li', {}, `${t.database}: ${t.schema}.${t.name}, ${number(t.differences)}`))),
        ],
      });
      const told = (report) => `Repaired ${number(report.repaired)} rows. Verified: ${counted(report)}`;
      if (sure) order(state, draw, told, () => kept(state, () => post(of(state.route.name, '/verify'), { repair: true })));
    },
    fix: async (target, _event, state, draw) => {
      const { rule } = target.dataset;
      const path = of(state.route.name, '/fix');
      let shown = null;
      await order(state, draw, null, async () => { shown = await post(path, { rule }); });
      if (!shown) return;
      const sure = await ask({
        title: `Fix ${rule}?`, good: shown.refused ? 'Close' : 'Run it', danger: !shown.refused,
        body: [
          shown.refused ? h('p', { class: 'notice warn' }, `It is not run from here: ${shown.refused}`) : h('p', {}, 'This is run, in this order:'),
          shown.statements.map((one) => [h('p', { class: 'muted small' }, `On the ${one.server}, database ${one.database}`), h('pre', {}, one.sql)]),
        ],
      });
      if (!sure || shown.refused) return;
      const told = (done) => `${rule}: ${[...new Set(done.found.map((one) => one.outcome))].join(', ') || 'done'}.`;
      await order(state, draw, told, async () => {
        const done = await post(path, { rule, apply: true });
        const rest = (state.detail.validation || []).filter((one) => one.code !== rule);
        state.detail.validation = [...rest, ...done.found];
        return done;
      });
    },
  };
}
