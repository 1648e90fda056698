// The page's frame: which view is shown, the live state, and what is done when something is clicked.
//
// Views draw from `state` alone, and are drawn again whenever it changes; `morph` keeps what the reader is at.

import { askToken, follow, get, newKey } from './api.js';
import { h, morph, number, pill, say, seconds, table, time } from './dom.js';
import * as detail from './detail.js';
import * as wizard from './wizard.js';

const main = document.getElementById('main');

/** Everything that views draw from. */
const state = {
  live: null, linked: false, route: { view: 'list' },
  /** What was asked for the migration that is shown. */
  detail: {},
  wizard: null,
};

function routeOf(hash) {
  const [view, name, tab] = hash.replace(/^#\//, '').split('/').map(decodeURIComponent);
  if (view === 'new') return { view: 'new' };
  if (view === 'm' && name) return { view: 'detail', name, tab: detail.TABS.some(([id]) => id === tab) ? tab : 'overview' };
  return { view: 'list' };
}

const views = {
  list: { title: () => 'Migrations', draw: drawList },
  new: { title: () => 'New migration', draw: () => wizard.draw(state) },
  detail: { title: () => state.route.name, draw: () => detail.draw(state) },
};

/** Draws the view again. */
export function draw() {
  const view = views[state.route.view];
  document.title = `${view.title()} – pgcutover`;
  const next = main.cloneNode(false);
  next.append(...[view.draw()].flat(Infinity).filter(Boolean));
  morph(main, next);
  drawFrame();
}

function drawFrame() {
  const { live, linked } = state;
  const link = document.getElementById('link');
  link.className = `link ${linked ? 'live' : 'lost'}`;
  const words = linked ? 'Live' : 'Reconnecting';
  if (link.textContent !== words) link.textContent = words;
  document.getElementById('servers').textContent = live ? `${live.source} → ${live.target}` : '';
  document.getElementById('version').textContent = live ? `pgcutover ${live.version}` : '';
  const banner = document.getElementById('banner');
  banner.hidden = !(live && live.not_ready);
  const text = live && live.not_ready ? `Clients are not served: ${live.not_ready}` : '';
  if (banner.textContent !== text) banner.textContent = text;
}

function drawList() {
  const migrations = state.live && state.live.migrations;
  const head = h('div', { class: 'head' }, h('h1', {}, 'Migrations'),
    h('div', { class: 'actions' }, h('a', { class: 'button primary', href: '#/new' }, 'New migration')));
  if (!state.live) return [head, h('p', { class: 'muted' }, 'Loading …')];
  if (!migrations) return [head, h('div', { class: 'card' }, h('p', {}, 'The engine cannot be asked now: is the target reachable?'))];
  const columns = [
    { label: 'Name', class: 'long', cell: (m) => h('a', { href: `#/m/${encodeURIComponent(m.name)}` }, m.name) },
    { label: 'Status', cell: pill },
    { label: 'Migration mode', cell: (m) => m.mode },
    { label: 'Migration type', cell: (m) => m.option },
    { label: 'Source server', class: 'long', cell: (m) => m.source },
    { label: 'Source server type', cell: (m) => m.source_server_type },
    { label: 'Databases', class: 'long', cell: (m) => m.databases.map((d) => d.name).join(', ') || '–' },
    { label: 'Duration', class: 'num', cell: (m) => seconds(m.finished_at ? m.duration_seconds : Math.max(0, state.live.at - m.started_at)) },
    { label: 'Start time', class: 'nowrap', cell: (m) => time(m.started_at) },
  ];
  const list = migrations.length
    ? h('div', { class: 'card' }, table('Migrations, newest first', columns, migrations))
    : h('div', { class: 'card empty' }, h('h2', {}, 'Nothing is being moved'),
      h('p', { class: 'muted' }, 'A migration copies databases from the source to the target and follows every change, until you cut over.'),
      h('a', { class: 'button primary', href: '#/new' }, 'Create the first one'));
  return [head, list, drawRoutes()];
}

function drawRoutes() {
  const columns = [
    { label: 'Database', cell: (r) => r.database },
    { label: 'Runs on', cell: (r) => (r.server ? `${r.server} (${r.server === 'source' ? state.live.source : state.live.target})` : h('span', { class: 'pill bad' }, 'nowhere')) },
    { label: 'Since cutover', class: 'num', cell: (r) => (r.epoch ? number(r.epoch) : '–') },
    { label: 'Sessions', class: 'num', cell: (r) => number(r.sessions) },
    { label: 'In transactions', class: 'num', cell: (r) => number(r.inside) },
    { label: 'Transactions', cell: (r) => (r.held ? h('span', { class: 'pill warn' }, 'held') : 'running') },
  ];
  return h('section', { class: 'card', 'aria-labelledby': 'routes' }, h('h2', { id: 'routes' }, 'Where databases run'),
    state.live.routes.length ? table('Databases of the proxy', columns, state.live.routes) : h('p', { class: 'muted' }, 'No client has asked for a database yet.'));
}

function navigate() {
  const before = state.route;
  state.route = routeOf(location.hash);
  const same = before.view === state.route.view && before.name === state.route.name;
  if (state.route.view === 'new' && before.view !== 'new') state.wizard = wizard.begin(newKey());
  if (state.route.view === 'detail' && before.name !== state.route.name) state.detail = {};
  draw();
  if (!same) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
    say(views[state.route.view].title());
  }
  if (state.route.view === 'detail') detail.refresh(state, draw);
}

function theme(next) {
  const dark = next ?? (localStorage.getItem('pgcutover-theme') || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'));
  document.documentElement.dataset.theme = dark;
  document.getElementById('theme-button').setAttribute('aria-pressed', String(dark === 'dark'));
  return dark;
}

const actions = {
  skip: (_, event) => { event.preventDefault(); main.focus(); },
  theme: () => localStorage.setItem('pgcutover-theme', theme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark')),
  token: () => askToken(null),
  ...wizard.actions,
  ...detail.actions,
};

document.addEventListener('click', (event) => {
  const target = event.target.closest('[data-act]');
  if (target && actions[target.dataset.act]) actions[target.dataset.act](target, event, state, draw);
});
document.addEventListener('submit', (event) => {
  const target = event.target.closest('form[data-submit]');
  if (!target) return;
  event.preventDefault();
  actions[target.dataset.submit](target, event, state, draw);
});
for (const kind of ['input', 'change']) {
  document.addEventListener(kind, (event) => {
    const target = event.target.closest('[data-field]');
    if (target) actions.field(target, event, state, draw);
  });
}
// Tabs are moved through with the arrow keys (ARIA Authoring Practices, pattern "tabs").
document.addEventListener('keydown', (event) => {
  const tab = event.target.closest('[role="tab"]');
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!tab || !step) return;
  const tabs = [...tab.parentElement.querySelectorAll('[role="tab"]')];
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
});

theme();
addEventListener('hashchange', navigate);
follow((live) => {
  const was = state.live;
  state.live = live;
  announce(was, live);
  draw();
  if (state.route.view === 'detail') detail.changed(state, was, draw);
}, (linked) => {
  if (state.linked === linked) return;
  state.linked = linked;
  drawFrame();
});
setInterval(() => { if (state.route.view === 'detail' && !document.hidden) detail.refresh(state, draw); }, 3000);
navigate();
get('/api/v1/version').catch((refusal) => say(refusal.message));

/** Tells who does not see the page that a migration has gone a step further. */
function announce(was, live) {
  for (const migration of live.migrations || []) {
    const before = was && (was.migrations || []).find((m) => m.name === migration.name);
    if (before && before.substate !== migration.substate) say(`${migration.name}: ${pill(migration).textContent}`);
  }
}
