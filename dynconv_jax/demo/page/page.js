// The page: what is chosen, what is shown.

import {dimUnseen, newCanvas, overlay, ponderCost, readPixels, seenBox} from './draw.js';

const MAX_SHOWN = 960, THUMB = 144, TOP = 5;
const $ = id => document.getElementById(id);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const words = name => name.replaceAll('_', ' ');
const significant = (x, digits = 3) => Number(x.toPrecision(digits)).toString();

let backend, description, network, photo, result;
// What the picture shows: 'photo', 'all', or the number of a block.
let view = 'all';
let turns = 0;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showError(error) {
  $('error').textContent = error ? `Error: ${error.message ?? error}` : '';
  $('error').hidden = !error;
}

function showStatus(text) {
  $('status').textContent = text;
  $('status').classList.toggle('busy', Boolean(text));
}

/** Returns a list item: a bar with a label and a value. */
function bar(label, value, share, accent) {
  const fill = element('span');
  fill.style.width = `${100 * Math.min(1, share)}%`;
  return element('li', {className: accent ? 'accent' : ''},
    element('span', {className: 'label', textContent: label, title: label}),
    element('span', {className: 'value', textContent: value}),
    element('span', {className: 'track'}, fill));
}

function showFacts() {
  const order = result.probabilities.map((p, i) => [p, words(network.class_names[i])])
    .sort((a, b) => b[0] - a[0]).slice(0, TOP);
  $('class').textContent = order[0][1];
  $('probability').textContent = percent(order[0][0], 1);
  $('top').replaceChildren(...order.map(
    ([p, name], i) => bar(name, percent(p, 1), p, i === 0)));
  const dense = network.dense_macs, most = Math.max(dense, result.macs);
  const gmacs = macs => `${significant(macs / 1e9)} GMACs`;
  $('gmacs').textContent = gmacs(result.macs);
  $('share').textContent = network.gated
    ? `${percent(result.macs / dense)} of the dense network` : 'no gates';
  $('compute').replaceChildren(
    ...network.gated ? [bar('Executed', gmacs(result.macs), result.macs / most, true)] : [],
    bar('Dense network', gmacs(dense), dense / most, !network.gated));
  showTimes(null);
}

function showTimes(times) {
  $('times-note').textContent = times
    ? `Median of ${description.timed_calls} calls each, one photograph at a time, ${backend.note}.`
    : 'Each form is run several times.';
  if (!times) {
    $('speedup').textContent = 'Measuring …';
    $('times').replaceChildren();
    return;
  }
  const {sparse_ms: sparse, dense_ms: dense} = times;
  const most = Math.max(sparse ?? 0, dense);
  const ms = value => `${significant(value)} ms`;
  $('speedup').textContent = network.gated
    ? `${significant(dense / sparse, 2)}× the speed of dense` : ms(dense);
  $('times').replaceChildren(
    ...network.gated ? [bar('Sparse', ms(sparse), sparse / most, true)] : [],
    bar('Dense', ms(dense), dense / most, !network.gated));
}

/** Returns the masks that a view shows. */
function masksOf(shown) {
  const masks = network.blocks.map(
    (block, i) => ({size: block.size, values: result.masks[i]}));
  return shown === 'all' ? masks : [masks[shown]];
}

function draw(canvas, box, width, height, shown) {
  const [, context] = newCanvas(width, height, canvas);
  const image = readPixels(photo.bitmap, box, canvas.width, canvas.height);
  const seen = seenBox(photo.bitmap.width, photo.bitmap.height, network).map(
    (x, i) => (x - box[i % 2]) * (i % 2 ? height : width) / (box[i % 2 + 2] - box[i % 2]));
  if (shown === 'photo') {
    dimUnseen(image, seen);
  } else {
    const size = network.image_size;
    overlay(image, ponderCost(masksOf(shown), size), size, seen);
  }
  context.putImageData(image, 0, 0);
}

function density(shown) {
  const masks = masksOf(shown);
  const share = values => values.split('1').length / values.length - 1 / values.length;
  return masks.reduce((sum, mask) => sum + share(mask.values), 0) / masks.length;
}

function showPicture() {
  const {width, height} = photo.bitmap;
  // A picture of few pixels is drawn larger, so that masks keep their edges.
  const scale = MAX_SHOWN / Math.max(width, height);
  draw($('map'), [0, 0, width, height],
    Math.max(1, width * scale), Math.max(1, height * scale), view);
  const block = network.blocks[view];
  let text;
  if (!network.blocks.length) {
    text = network.gated ? 'Its masks are not spatial.'
      : 'A dense network computes everywhere.';
  } else if (view === 'photo') {
    text = 'The photograph. Dark areas are outside the network\u2019s input.';
  } else if (view === 'all') {
    text = `All ${network.blocks.length} gated blocks: on average, ` +
      `${percent(density(view))} of them ran at a position.`;
  } else {
    text = `${block.name}, stage ${block.stage}: ran at ${percent(density(view))} of ` +
      `${block.size[0]} × ${block.size[1]} positions.`;
  }
  $('caption').textContent = text;
  $('map').setAttribute('aria-label', text);
  $('legend').hidden = view === 'photo';
  $('legend').firstChild.textContent = view === 'all' ? '0' : 'skipped';
  $('legend').lastChild.textContent = view === 'all' ? '100 % of blocks' : 'ran';
}

function showBlocks() {
  const views = ['photo', 'all', ...network.blocks.keys()];
  $('blocks').hidden = !network.blocks.length;
  if (!network.blocks.length || !views.includes(view)) {
    view = network.blocks.length ? 'all' : 'photo';
  }
  if (!network.blocks.length) {
    $('block-list').replaceChildren();
    return;
  }
  const box = seenBox(photo.bitmap.width, photo.bitmap.height, network);
  $('block-list').replaceChildren(...views.map(shown => {
    const canvas = element('canvas');
    draw(canvas, box, THUMB, THUMB, shown);
    const names = {photo: 'Photo', all: 'All blocks'};
    const name = names[shown] ?? network.blocks[shown].name;
    const input = element('input', {
      type: 'radio', name: 'view', value: shown, checked: shown === view});
    input.addEventListener('change', () => { view = shown; showPicture(); });
    return element('label', {title: name}, input, canvas,
      element('span', {className: 'label', textContent: name}),
      element('span', {
        className: 'value',
        textContent: shown === 'photo' ? '' : percent(density(shown))}));
  }));
}

async function predict() {
  if (!photo) return;
  const turn = ++turns;
  showError(null);
  $('result').classList.add('stale');
  showStatus('Running the network …');
  const slow = setTimeout(() => {
    if (turn === turns) showStatus(backend.slow);
  }, 1500);
  try {
    const found = await backend.predict(network, photo);
    clearTimeout(slow);
    if (turn !== turns) return;
    result = found;
    showBlocks();
    showFacts();
    showPicture();
    $('result').hidden = false;
    $('result').classList.remove('stale');
    showStatus('');
    // On a phone the result is below the fold.
    if ($('result').getBoundingClientRect().top > innerHeight - 100) {
      $('result').scrollIntoView();
    }
    const times = await found.times;
    if (turn === turns && times) showTimes(times);
  } catch (error) {
    if (turn !== turns) return;
    showError(error);
    showStatus('');
    $('result').hidden = !result || $('result').classList.contains('stale');
  } finally {
    clearTimeout(slow);
  }
}

async function take(file) {
  const turn = ++turns;
  if (!await ready) return;
  try {
    if (file.size > description.max_bytes) {
      throw new Error(`the photograph has ${(file.size / 1e6).toFixed(0)} MB; at most ` +
        `${description.max_bytes / 1e6} MB are allowed`);
    }
    const bitmap = await createImageBitmap(
      file, {imageOrientation: 'from-image', colorSpaceConversion: 'none'}
    ).catch(() => {
      throw new Error(`${file.name ?? 'the file'} is not a picture that this browser can read`);
    });
    const {width, height} = bitmap;
    if (width * height > description.max_pixels) {
      throw new Error(`the photograph has ${width} × ${height} pixels; at most ` +
        `${description.max_pixels / 1e6} megapixels are allowed`);
    }
    if (turn !== turns) return;
    photo = {file, bitmap};
    $('controls').classList.add('has-picture');
    await predict();
  } catch (error) {
    if (turn === turns) showError(error);
  }
}

/** The networks that the slider moves among. */
function family(chosen) {
  const members = description.networks.filter(
    other => chosen.knob && other.knob === chosen.knob && other.model === chosen.model &&
      other.method === chosen.method);
  return new Set(members.map(other => other.knob_value)).size > 1 ? members : [];
}

function choose(chosen) {
  network = chosen;
  $('network').value = chosen.name;
  const members = family(chosen), values = members.map(other => other.knob_value);
  $('budget-field').hidden = !members.length;
  if (members.length) {
    const slider = $('budget');
    [slider.min, slider.max] = [Math.min(...values), Math.max(...values)];
    slider.value = chosen.knob_value;
    const name = words(chosen.knob);
    $('budget-name').textContent = name[0].toUpperCase() + name.slice(1);
    $('budget-value').textContent = chosen.knob_value;
    $('budget-least').textContent = slider.min;
    $('budget-most').textContent = slider.max;
    $('budget-ticks').replaceChildren(
      ...[...new Set(values)].map(value => element('option', {value})));
  }
  const facts = [chosen.model, chosen.method,
    chosen.knob ? `${words(chosen.knob)} ${chosen.knob_value}` : '',
    `${chosen.image_size} × ${chosen.image_size} pixels`,
    `${chosen.class_names.length} classes: ${chosen.class_names.slice(0, 12).map(words).join(', ')}` +
      (chosen.class_names.length > 12 ? ' …' : '')];
  $('about').textContent = facts.filter(Boolean).join(' · ');
}

/** Returns the network of the value nearest to the slider's. */
function nearest() {
  const value = Number($('budget').value);
  const distance = other => Math.abs(other.knob_value - value);
  return family(network).reduce(
    (best, other) => distance(other) < distance(best) ? other : best, network);
}

function showExamples() {
  $('examples').hidden = !description.examples.length;
  $('example-list').replaceChildren(...description.examples.map(({name, path}) => {
    const button = element('button', {type: 'button', title: words(name)},
      element('img', {src: path, alt: words(name), loading: 'lazy'}));
    button.addEventListener('click', async () => {
      const response = await fetch(path).catch(showError);
      if (response) await take(await response.blob());
    });
    return button;
  }));
}

function listen() {
  $('file').addEventListener('change', event => {
    const [file] = event.target.files;
    if (file) take(file);
    event.target.value = '';
  });
  addEventListener('dragover', event => {
    event.preventDefault();
    $('drop').classList.add('over');
  });
  addEventListener('dragleave', event => {
    if (!event.relatedTarget) $('drop').classList.remove('over');
  });
  addEventListener('drop', event => {
    event.preventDefault();
    $('drop').classList.remove('over');
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
  addEventListener('paste', event => {
    const [file] = event.clipboardData.files;
    if (file) take(file);
  });
  $('network').addEventListener('change', event => {
    choose(description.networks.find(other => other.name === event.target.value));
    predict();
  });
  $('budget').addEventListener('input', () => {
    $('budget-value').textContent = nearest().knob_value;
  });
  $('budget').addEventListener('change', () => {
    const chosen = nearest(), changed = chosen !== network;
    choose(chosen);
    if (changed) predict();
  });
  $('controls').addEventListener('submit', event => event.preventDefault());
}

/** Returns whether the page can be used; says why not. */
async function start() {
  try {
    const response = await fetch('networks.json');
    if (!response.ok) throw new Error(`cannot load networks.json: ${response.status}`);
    description = await response.json();
    backend = await import(`./${description.backend}.js`);
  } catch (error) {
    showError(error);
    return false;
  }
  backend.start?.(description);
  $('privacy').textContent = backend.privacy;
  $('network').replaceChildren(...description.networks.map(
    ({name}) => element('option', {value: name, textContent: name})));
  $('network-field').hidden = description.networks.length < 2;
  choose(description.networks[0]);
  showExamples();
  return true;
}

// A photograph may come before the networks are known.
listen();
const ready = start();
