// The page in a real Chromium, against real servers with a small checkpoint of random weights.
//
// PAGE_TOOLS is where playwright-core and axe-core are, CHROMIUM the browser, SPATIALSCORE_BINARY the program. With
// PAGE_PICTURES=FOLDER it takes the pictures of the documents instead, with the built-in checkpoint.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';

const require = createRequire(path.join(process.env.PAGE_TOOLS, 'package.json'));
const { chromium } = require('playwright-core');
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

const ROOT = path.join(import.meta.dirname, '../..');
const FIXTURE = path.join(ROOT, 'tests/fixtures/flat/checkpoint');
const TOKEN = 'looker-0123456789abcdef';
const PROMPT = 'A cup is to the left of a plate, and the plate is on top of a table.';
const sample = name => path.join(ROOT, 'samples', `${name}.png`);
const base64 = name => readFileSync(sample(name)).toString('base64');
const pictures = process.env.PAGE_PICTURES;

let browser;
const servers = [];

/** A server on a free port, once it serves. */
function serve(...args) {
  const all = ['serve', '--listen=127.0.0.1:0', '--http=127.0.0.1:0', '--metrics-listen=', '--log-format=json', '--device=cpu', ...args];
  const child = spawn(process.env.SPATIALSCORE_BINARY, all, { stdio: ['ignore', 'ignore', 'pipe'] });
  servers.push(child);
  let log = '';
  return new Promise((up, failed) => {
    child.stderr.on('data', data => {
      log += data;
      if (log.includes('"message":"serving"')) up({ child, url: `${log.match(/"http":"([^"]*)"/)[1]}/` });
    });
    child.on('exit', code => failed(new Error(`the server ended with ${code}: ${log}`)));
  });
}

/** A page of a tab of its own, which may say nothing to the console and ask nobody else. */
async function open(url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(15_000);
  const faults = [];
  page.on('pageerror', error => faults.push(error.message));
  page.on('console', message => {
    // That a call was refused, which is what some tests are about.
    if (message.type() === 'error' && !/the server responded with a status|ERR_CONNECTION/.test(message.text())) faults.push(message.text());
  });
  page.on('request', request => {
    if (!request.url().startsWith(url) && !/^(blob|data):/.test(request.url())) faults.push(`asks ${request.url()}`);
  });
  page.done = async () => {
    await context.close();
    assert.deepEqual(faults, []);
  };
  await page.goto(url);
  return page;
}

const ready = page => page.locator('#server').filter({ hasText: 'server 0' }).waitFor();
const go = page => page.locator('#go').click();
const done = page => page.locator('#status').filter({ hasText: 'Done.' }).waitFor();
const choose = (page, ...names) => page.locator('#files').setInputFiles(names.map(sample));

/** What axe finds, in light and in dark, and whether anything is wider than the window. */
async function accessible(page, what) {
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    // Past the policy of the page, which is for the page.
    await page.evaluate(AXE);
    const { violations } = await page.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] }));
    const told = violations.map(({ id, nodes }) => `${id}: ${nodes.map(node => `${node.html} ${node.failureSummary}`).join(' | ')}`);
    assert.deepEqual(told, [], `${what}, ${colorScheme}`);
  }
  await page.emulateMedia({ colorScheme: null });
  const { width } = page.viewportSize();
  await page.setViewportSize({ width: 360, height: 740 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= 360, `${what}: ${wide} px wide on 360`);
  await page.setViewportSize({ width, height: 900 });
}

before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
});

after(async () => {
  await browser?.close();
  for (const child of servers) child.kill('SIGKILL');
});

if (pictures) test('pictures for the documents', async () => {
  const { url } = await serve('--set=recent.keep=600', '--set=recent.prompts=true', '--set=recent.thumbnails=true');
  const page = await open(url, { viewport: { width: 1000, height: 800 } });
  await ready(page);
  const use = async (...names) => {
    for (const name of names) await page.getByRole('button', { name }).click();
  };
  const picture = async (name, top = 0) => {
    await page.evaluate(y => { document.activeElement.blur(); scrollTo(0, y); }, top);
    await page.screenshot({ path: path.join(pictures, `page-${name}.png`) });
  };
  await page.locator('#samples summary').click();
  await use('banana right', 'banana twin');
  await page.locator('#samples summary').click();
  await go(page);
  await done(page);
  await page.getByText('What the model saw').first().click();
  await page.locator('.conversation').waitFor();
  await picture('score');
  await page.locator('#tab-compare').click();
  await go(page);
  await page.getByText('banana.right.png').nth(1).waitFor();
  await page.locator('table').first().waitFor();
  await picture('compare');
  await page.locator('#tab-why').click();
  await page.getByRole('button', { name: 'Remove banana.twin.png' }).click();
  await page.emulateMedia({ colorScheme: 'dark' });
  await go(page);
  await page.getByRole('heading', { name: 'Mirrored' }).waitFor({ timeout: 60_000 });
  await picture('why');
  await page.emulateMedia({ colorScheme: null });
  // What a policy might have had scored meanwhile: each sample under its prompt, and the same picture twice.
  const manifest = readFileSync(path.join(ROOT, 'samples/manifest.jsonl'), 'utf8').trim().split('\n').map(line => JSON.parse(line));
  for (const { prompt } of manifest) {
    const body = new FormData();
    body.append('prompt', prompt);
    for (const { image } of manifest) body.append('image', new Blob([readFileSync(path.join(ROOT, 'samples', image))]));
    assert.equal((await fetch(`${url}v1/score`, { method: 'POST', body })).status, 200);
  }
  await page.locator('#tab-recent').click();
  await page.locator('#most').fill('4');
  await go(page);
  await page.getByRole('heading', { name: /^spatialscore-mini, asked by/ }).first().waitFor();
  await page.setViewportSize({ width: 1000, height: 900 });
  await picture('recent', 176);
  await page.done();
});
else {
  let open_server;
  before(async () => { open_server = await serve(`--checkpoint=${FIXTURE}`); });

  test('pictures are dropped, pasted and picked, and scored', async () => {
    const page = await open(open_server.url);
    await ready(page);
    await accessible(page, 'at first');
    await go(page);
    // The prompt is asked for by the browser itself.
    assert.equal(await page.evaluate(() => document.activeElement.id), 'prompt');
    await page.locator('#prompt').fill(PROMPT);
    await go(page);
    assert.equal(await page.locator('#problem').textContent(), 'Choose a picture first.');
    for (const [kind, name] of [['drop', 'apple.right'], ['paste', 'apple.twin']]) {
      await page.evaluate(([kind, name, data]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], `${name}.png`, { type: 'image/png' }));
        const event = kind === 'drop' ? new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true })
          : new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true, cancelable: true });
        (kind === 'drop' ? document.getElementById('drop') : document).dispatchEvent(event);
      }, [kind, name, base64(name)]);
    }
    await choose(page, 'banana.right');
    assert.deepEqual(await page.locator('#pictures .name').allTextContents(), ['apple.right.png', 'apple.twin.png', 'banana.right.png']);
    await go(page);
    await done(page);
    // What is shown is what the call says, to the digits shown.
    const body = new FormData();
    body.append('prompt', PROMPT);
    for (const name of ['apple.right', 'apple.twin', 'banana.right']) body.append('image', new Blob([readFileSync(sample(name))]));
    const { items } = await (await fetch(`${open_server.url}v1/score`, { method: 'POST', body })).json();
    const short = value => Number(value.toPrecision(4)).toString().replace('-', '\u2212');
    const expected = items.map(({ scores: [{ mean, stddev }] }) => (stddev == null ? short(mean) : `${short(mean)} ± ${short(stddev)}`));
    assert.deepEqual(await page.locator('.card .number').allTextContents(), expected);
    assert.equal(await page.locator('.card svg.bar .mean').count(), 3);
    await page.getByText('What the model saw').first().click();
    await page.locator('.conversation mark').waitFor();
    const seen = page.locator('img.seen').first();
    assert.equal(await seen.evaluate(image => image.decode().then(() => image.naturalWidth % 28)), 0);
    assert.ok((await page.locator('.conversation .prompt').first().textContent()).includes(PROMPT));
    await accessible(page, 'scored');
    await page.done();
  });

  test('a broken picture has words and its neighbour a score', async () => {
    const page = await open(open_server.url);
    await ready(page);
    await page.locator('#prompt').fill(PROMPT);
    await page.locator('#files').setInputFiles([{ name: 'broken.png', mimeType: 'image/png', buffer: readFileSync(sample('apple.right')).subarray(0, 5000) }]);
    await choose(page, 'apple.twin');
    await go(page);
    await done(page);
    const cards = page.locator('.card');
    assert.match(await cards.nth(0).textContent(), /No score: items\[0\]\.image\.encoded: /);
    assert.match(await cards.nth(1).locator('.number').textContent(), /\d/);
    await cards.nth(0).getByText('What the model saw').click();
    await cards.nth(0).getByText('saw nothing').waitFor();
    await accessible(page, 'a broken picture');
    await page.done();
  });

  test('pictures are compared as a group', async () => {
    const page = await open(open_server.url);
    await ready(page);
    await page.locator('#tab-compare').click();
    await page.locator('#prompt').fill(PROMPT);
    await choose(page, 'apple.right');
    await go(page);
    await page.locator('#problem').filter({ hasText: 'Choose 2 to 24 pictures; there are 1.' }).waitFor();
    await choose(page, 'apple.twin', 'banana.right', 'panda.twin');
    await go(page);
    await done(page);
    const rows = page.locator('table').nth(0).locator('tbody tr');
    const means = (await rows.locator('.number').allTextContents()).map(text => Number(text.split(' ')[0].replace('\u2212', '-')));
    assert.equal(means.length, 4);
    assert.deepEqual(means, [...means].sort((a, b) => b - a));
    assert.deepEqual(await rows.locator('td:nth-child(5)').allTextContents(), ['top 1', '', '', 'bottom 1']);
    const gains = (await rows.locator('td:nth-child(4)').allTextContents()).map(text => Number(text.replace('\u2212', '-')));
    assert.ok(Math.abs(gains.reduce((a, b) => a + b)) < 0.01 && gains[0] > 0, `${gains}`);
    const chances = await page.locator('table').nth(1).locator('tbody tr').evaluateAll(rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => parseInt(cell.textContent, 10))));
    for (const [a, row] of chances.entries()) for (const [b, chance] of row.entries()) if (a !== b) assert.ok(Math.abs(chance + chances[b][a] - 100) <= 1, `${chances}`);
    await accessible(page, 'compared');
    await page.done();
  });

  test('a score is explained line by line, and can be stopped', async () => {
    const page = await open(open_server.url);
    await ready(page);
    await page.locator('#tab-why').click();
    await page.locator('#prompt').fill(PROMPT);
    await choose(page, 'apple.right', 'apple.twin');
    await go(page);
    await page.locator('#problem').filter({ hasText: 'Choose one picture; there are 2.' }).waitFor();
    await page.getByRole('button', { name: 'Remove apple.twin.png' }).click();
    await page.locator('#cells').fill('9');
    await go(page);
    await done(page);
    assert.equal(await page.locator('.map rect').count(), 9);
    assert.match(await page.locator('.map svg').getAttribute('aria-label'), /of 3 rows and 3 columns/);
    const words = page.locator('td.text');
    assert.deepEqual(await words.allTextContents(), ['A cup is to the left of a plate', 'the plate is on top of a table', 'left', 'right', 'on top of', 'underneath']);
    await page.getByText('The map in numbers').click();
    await accessible(page, 'explained');
    await page.locator('#cells').fill('256');
    await go(page);
    await page.locator('progress').waitFor();
    await page.locator('#stop').click();
    await page.locator('#problem').filter({ hasText: 'Stopped.' }).waitFor();
    assert.equal(await page.locator('#go').isEnabled(), true);
    await page.done();
  });

  test('what was scored of late is shown, with pictures where they are kept', async () => {
    const { url } = await serve(`--checkpoint=${FIXTURE}`, '--set=recent.keep=600', '--set=recent.prompts=true', '--set=recent.thumbnails=true');
    const page = await open(url);
    await ready(page);
    await page.locator('#tab-recent').click();
    assert.equal(await page.locator('#prompt').isVisible(), false);
    await go(page);
    await page.getByText('Nothing was scored in this time.').waitFor();
    await accessible(page, 'nothing of late');
    const names = ['apple.right', 'apple.twin', 'banana.right', 'panda.twin'];
    const body = new FormData();
    body.append('prompt', PROMPT);
    for (const name of names) body.append('image', new Blob([readFileSync(sample(name))]));
    const { items } = await (await fetch(`${url}v1/score`, { method: 'POST', body })).json();
    const means = items.map(item => item.scores[0].mean).sort((a, b) => b - a);
    await page.locator('#most').fill('3');
    await go(page);
    await page.getByRole('heading', { name: /asked by 127\.0\.0\.1 \(training\)/ }).waitFor();
    await done(page);
    const short = value => Number(value.toPrecision(4)).toString().replace('-', '\u2212');
    const shown = async at => (await page.locator('.shown').nth(at).locator('.number').allTextContents()).map(text => text.split(' ')[0]);
    assert.deepEqual(await shown(0), means.slice(0, 3).map(short));
    assert.deepEqual(await shown(1), means.slice(1).reverse().map(short));
    assert.match(await page.locator('#results').textContent(), /Groups of several pictures of one prompt: 1; without spread: 0 \(0 %\)/);
    const thumb = page.locator('.shown img').first();
    assert.equal(await thumb.evaluate(image => image.decode().then(() => Math.max(image.naturalWidth, image.naturalHeight))), 96);
    assert.equal(await thumb.getAttribute('alt'), PROMPT);
    assert.equal(await page.locator('svg.time rect').count(), 1);
    const rows = page.locator('table').filter({ hasText: 'What scores high' }).locator('tbody th');
    assert.deepEqual(await rows.allTextContents(), ['Saturation', 'Sharpness']);
    await page.getByText('Over time, in numbers').click();
    await accessible(page, 'of late');
    // What is wrong is said, and the other views have their fields again.
    await page.locator('#seconds').fill('601');
    await go(page);
    await page.locator('#problem').filter({ hasText: 'seconds: must be 1 to 600' }).waitFor();
    await page.locator('#tab-score').click();
    assert.equal(await page.locator('#prompt').isVisible(), true);
    await page.done();
  });

  test('a server that keeps nothing says so, and the keyboard is enough to see it', async () => {
    const page = await open(open_server.url);
    await ready(page);
    await page.locator('#tab-score').focus();
    await page.keyboard.press('ArrowLeft');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'tab-recent');
    await page.keyboard.press('Tab');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'seconds');
    await page.keyboard.press('Enter');
    await page.locator('#problem').filter({ hasText: 'nothing is kept of what was scored: recent.keep is 0' }).waitFor();
    await accessible(page, 'nothing is kept');
    await page.done();
  });

  test('a server that drains says so', async () => {
    const { child, url } = await serve(`--checkpoint=${FIXTURE}`, '--set=server.drain_grace_seconds=0', '--set=http.explain_cells=4096');
    const page = await open(url);
    await ready(page);
    await page.locator('#tab-why').click();
    await page.locator('#prompt').fill(PROMPT);
    await choose(page, 'apple.right');
    await page.locator('#cells').fill('4096');
    await go(page);
    await page.locator('progress').waitFor();
    const gone = new Promise(resolve => child.once('exit', resolve));
    child.kill('SIGTERM');
    await page.locator('#problem').filter({ hasText: 'the server is shutting down' }).waitFor();
    // What was known by then is shown.
    await page.getByRole('heading', { name: 'Mirrored' }).waitFor();
    await page.done();
    assert.equal(await gone, 0);
  });

  test('a sample is one click away and the keyboard is enough', async () => {
    const page = await open(open_server.url);
    await ready(page);
    const on = () => page.evaluate(() => { const at = document.activeElement; return at.id || at.textContent.trim(); });
    const tab_to = async (want, most = 40) => {
      for (let step = 0; step < most; step += 1) {
        if ((await on()) === want) return;
        await page.keyboard.press('Tab');
      }
      assert.fail(`Tab never comes to ${want}`);
    };
    await tab_to('tab-score');
    await page.keyboard.press('ArrowRight');
    assert.equal(await on(), 'tab-compare');
    await page.keyboard.press('ArrowLeft');
    assert.equal(await on(), 'tab-score');
    await tab_to('Samples');
    await page.keyboard.press('Enter');
    await tab_to('panda right');
    await page.keyboard.press('Space');
    await page.locator('#pictures li').waitFor();
    assert.match(await page.locator('#prompt').inputValue(), /^A panda is partly hidden/);
    await tab_to('go');
    await page.keyboard.press('Enter');
    await done(page);
    assert.equal(await on(), 'results');
    await tab_to('What the model saw');
    await page.keyboard.press('Enter');
    await page.locator('.conversation').waitFor();
    await page.done();
  });

  test('a token is asked for, refused, taken, and kept for the tab alone', async () => {
    const folder = mkdtempSync(path.join(tmpdir(), 'page-'));
    writeFileSync(path.join(folder, 'tokens'), `looker:${TOKEN}\n`);
    const { url } = await serve(`--checkpoint=${FIXTURE}`, `--tokens-file=${path.join(folder, 'tokens')}`);
    const page = await open(url);
    const dialog = page.getByRole('dialog');
    await dialog.waitFor();
    await accessible(page, 'a token is asked for');
    const give = async token => {
      await page.locator('#token').fill(token);
      await page.keyboard.press('Enter');
    };
    await give('another-0123456789abcdef');
    await page.locator('#token-refused').filter({ hasText: 'not known' }).waitFor();
    await give(TOKEN);
    await ready(page);
    assert.equal(await dialog.isVisible(), false);
    await page.reload();
    await ready(page);
    await page.locator('#prompt').fill(PROMPT);
    await choose(page, 'apple.right');
    await go(page);
    await done(page);
    assert.equal(await page.evaluate(() => localStorage.length + document.cookie.length), 0);
    const other = await open(url);
    await other.getByRole('dialog').waitFor();
    await other.keyboard.press('Escape');
    await other.locator('#problem').filter({ hasText: 'No token was given.' }).waitFor();
    await other.done();
    await page.done();
  });

  test('a server that is gone is said to be', async () => {
    const { child, url } = await serve(`--checkpoint=${FIXTURE}`, '--set=server.drain_grace_seconds=0');
    const page = await open(url);
    await ready(page);
    await page.locator('#prompt').fill(PROMPT);
    await choose(page, 'apple.right');
    const gone = new Promise(resolve => child.once('exit', resolve));
    child.kill('SIGTERM');
    assert.equal(await gone, 0);
    await go(page);
    await page.locator('#problem').filter({ hasText: 'The server does not answer.' }).waitFor();
    assert.equal(await page.locator('#go').isEnabled(), true);
    await page.done();
  });

  test('a page left open asks nothing', async () => {
    const page = await open(open_server.url);
    await ready(page);
    let asked = 0;
    page.on('request', () => { asked += 1; });
    await page.waitForTimeout(2000);
    assert.equal(asked, 0);
    await page.done();
  });
}
