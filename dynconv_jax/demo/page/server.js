// Networks run by the server that serves the page.

export const note = 'on this machine, by the sparse executor and by XLA';
export const privacy = 'It is sent only to the server of this page.';
export const slow = 'Running the network. The first run compiles it …';

/** Returns what a network makes of a photograph; see networks.py, predict. */
export async function predict(network, photo) {
  const response = await fetch(
    `predict?network=${encodeURIComponent(network.name)}`,
    {method: 'POST', body: photo.file}
  ).catch(() => {
    throw new Error('the server does not answer; is it still running?');
  });
  const result = await response.json();
  if (!response.ok) throw new Error(result.error);
  return {...result, times: Promise.resolve(result)};
}
