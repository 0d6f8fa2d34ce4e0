// The numbers of a group, against values worked out elsewhere.

import assert from 'node:assert/strict';
import test from 'node:test';

import { advantages, ago, beats, normal, ranks, scale, short } from '../../src/edge/http/page/maths.js';

const near = (a, b, by = 1e-6) => assert.ok(Math.abs(a - b) < by, `${a}, not ${b}`);

test('the normal distribution is that of statistics.NormalDist', () => {
  for (const [z, p] of [[0, 0.5], [1, 0.8413447460685429], [-1, 0.15865525393145707], [1.96, 0.9750021048517795], [-3, 0.0013498980316300933]]) near(normal(z), p);
});

test('one beats the other by gap and spread', () => {
  near(beats({ mean: 3, stddev: 3 }, { mean: -2, stddev: 4 }), 0.8413447460685429);
  const [a, b] = [{ mean: 0.3, stddev: 1 }, { mean: 0.1, stddev: 0.5 }];
  near(beats(a, b) + beats(b, a), 1);
  assert.deepEqual([[2, 1], [1, 2], [1, 1]].map(([x, y]) => beats({ mean: x }, { mean: y })), [1, 0, 0.5]);
});

test('advantages are those of flow_grpo', () => {
  // numpy: (r - r.mean()) / (r.std() + 1e-4)
  [-1.3415207, -0.4471736, 0.4471736, 1.3415207].forEach((value, at) => near(advantages([1, 2, 3, 4])[at], value));
  assert.deepEqual(advantages([7, 7, 7]), [0, 0, 0]);
});

test('ranks, scales and words', () => {
  assert.deepEqual([0, 1.4, 119, 120, 600, 7200, 86400].map(ago), ['0 s', '1 s', '119 s', '2 min', '10 min', '2 h', '24 h']);
  assert.deepEqual(ranks([1, 5, 5, 0]), [3, 1, 1, 4]);
  const [low, high] = scale([{ mean: 1, stddev: 1 }, { mean: 5 }]);
  assert.ok(low < -1 && high > 5);
  assert.ok(scale([{ mean: 0 }])[0] < scale([{ mean: 0 }])[1]);
  assert.deepEqual([1.23456, -0.000123456, 0].map(short), ['1.235', '\u22120.0001235', '0']);
});
