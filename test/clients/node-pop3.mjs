// node-pop3's scenario: node-pop3.mjs LIBRARY PORT NAME SECRET DIRECTORY keep|delete
// Puts message N into DIRECTORY/N, as octets; what the replies said goes to standard output as JSON.
import {writeFileSync} from 'node:fs';
import {pathToFileURL} from 'node:url';

const [library, port, user, password, directory, what] = process.argv.slice(2);
const {default: Pop3Command} = await import(pathToFileURL(library));

// The library gives the text as it comes: dots still doubled, and without its last CRLF where that came in one piece with
// the final dot.  LIST's size tells which.
async function octets (stream, size) {
  const pieces = [];
  for await (const piece of stream) {
    pieces.push(piece);
  }
  const text = Buffer.concat(pieces).toString('latin1').replace(/(^|\n)\.\./g, '$1.');
  return Buffer.from(text.length === size - 2 ? text + '\r\n' : text, 'latin1');
}

const pop = new Pop3Command({user, password, host: '127.0.0.1', port: Number(port)});
const seen = {stat: await pop.STAT(), list: await pop.LIST(), uidl: await pop.UIDL(), one: [], top: []};
for (const [number, size] of seen.list) {
  seen.one.push([await pop.LIST(number), await pop.UIDL(number)]);
  seen.top.push(Buffer.from(await pop.TOP(number, 0), 'utf8').toString('latin1'));
  const [, stream] = await pop.command('RETR', number);
  writeFileSync(`${directory}/${number}`, await octets(stream, Number(size)));
  await pop.NOOP();
}
await pop.DELE(1);
await pop.RSET();
try {
  await pop.command('RETR', 1000);
} catch (error) {
  seen.error = error.message;
}
if (what === 'delete') {
  for (const [number] of seen.list) {
    await pop.DELE(number);
  }
}
seen.quit = await pop.QUIT();
process.stdout.write(JSON.stringify(seen));
