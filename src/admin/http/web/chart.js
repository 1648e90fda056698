// Charts of numbers over time, as SVG. A value that is not known is a gap, never a zero.

import { s, h } from './dom.js';

const WIDTH = 330;
const HEIGHT = 120;
const LEFT = 8;
const TOP = 20;
const BOTTOM = 22;

/** points: [{at, value}], oldest first; words: a value as text. */
export function chart(title, points, words) {
  const known = points.filter((point) => point.value !== null && point.value !== undefined);
  if (known.length < 2) return h('p', { class: 'muted small' }, `${title}: nothing to draw yet.`);
  const [first, last] = [points[0].at, points[points.length - 1].at];
  const highest = Math.max(...known.map((point) => point.value));
  const top = highest || 1;
  const x = (at) => LEFT + (WIDTH - 2 * LEFT) * ((at - first) / Math.max(last - first, 1));
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
  const runs = [[]];
  for (const point of points) {
    if (point.value === null || point.value === undefined) runs.push([]);
    else runs[runs.length - 1].push(`${x(point.at).toFixed(1)},${y(point.value).toFixed(1)}`);
  }
  const drawn = runs.filter((run) => run.length > 1);
  const ground = y(0);
  const now = known[known.length - 1].value;
  const minutes = Math.max(1, Math.round((last - first) / 60));
  const label = `${title}: now ${words(now)}, at most ${words(highest)} in the last ${minutes} min`;
  return s('svg', { class: 'chart', viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label },
    drawn.map((run) => s('polygon', { class: 'area', points: `${run[0].split(',')[0]},${ground} ${run.join(' ')} ${run[run.length - 1].split(',')[0]},${ground}` })),
    s('line', { class: 'axis', x1: LEFT, x2: WIDTH - LEFT, y1: ground, y2: ground }),
    s('line', { class: 'axis', x1: LEFT, x2: WIDTH - LEFT, y1: TOP, y2: TOP, 'stroke-dasharray': '3 4' }),
    drawn.map((run) => s('polyline', { class: 'line', points: run.join(' ') })),
    s('text', { x: LEFT, y: 13 }, top === highest ? words(top) : ''),
    s('text', { x: WIDTH - LEFT, y: 13, 'text-anchor': 'end' }, `now ${words(now)}`),
    s('text', { x: LEFT, y: HEIGHT - 6 }, `${minutes} min ago`),
    s('text', { x: WIDTH - LEFT, y: HEIGHT - 6, 'text-anchor': 'end' }, 'now'));
}

/** Counters to what was added in a second. */
export function rates(points) {
  return points.slice(1).map((point, index) => {
    const before = points[index];
    const length = point.at - before.at;
    const grown = point.value - before.value;
    // A counter that fell was begun anew by a restart.
    return { at: point.at, value: length > 0 && grown >= 0 ? grown / length : null };
  });
}

/** Lengths beside each other: [[name, milliseconds], …]. */
export function phases(lengths) {
  const all = lengths.reduce((sum, [, length]) => sum + length, 0) || 1;
  const label = lengths.map(([name, length]) => `${name} ${length} ms`).join(', ');
  let left = 0;
  const bars = lengths.map(([, length], index) => {
    const bar = s('rect', { class: `phase-${index}`, x: (left / all) * 1000, y: 0, width: (length / all) * 1000, height: 26 });
    left += length;
    return bar;
  });
  return h('div', {},
    s('svg', { class: 'bars', viewBox: '0 0 1000 26', preserveAspectRatio: 'none', role: 'img', 'aria-label': `Phases: ${label}` }, bars),
    h('ul', { class: 'legend' }, lengths.map(([name, length], index) => h('li', {},
      s('svg', { viewBox: '0 0 10 10', 'aria-hidden': 'true' }, s('rect', { class: `phase-${index}`, width: 10, height: 10, rx: 2 })),
      `${name} ${length} ms`))));
}
