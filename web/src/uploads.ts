// Files on their way up: two at a time, each with its progress; scoring goes on meanwhile.
import { signal } from '@preact/signals'
import { go, onUploaded, say } from './state'
import type { UploadAnswer } from './types'

export type UploadState = 'waiting' | 'sending' | 'stored' | 'known' | 'changed' | 'refused' | 'failed'
export interface Upload { key: number; file: File; sent: number; state: UploadState; note: string; image: number | null; job: number | null }

const AT_ONCE = 2
export const uploads = signal<Upload[]>([])
let count = 0

const change = (key: number, part: Partial<Upload>) => {
  uploads.value = uploads.value.map((u) => (u.key === key ? { ...u, ...part } : u))
}

export function addFiles(files: Iterable<File>): void {
  const fresh = [...files].map((file): Upload => ({ key: ++count, file, sent: 0, state: 'waiting', note: '', image: null, job: null }))
  if (!fresh.length) return
  uploads.value = [...uploads.value, ...fresh]
  go('/upload')
  pump()
}

export function again(key: number): void {
  change(key, { state: 'waiting', sent: 0, note: '' })
  pump()
}
export const clearDone = () => { uploads.value = uploads.value.filter((u) => ['waiting', 'sending', 'failed'].includes(u.state)) }

function pump() {
  const busy = uploads.value.filter((u) => u.state === 'sending').length
  for (const u of uploads.value.filter((x) => x.state === 'waiting').slice(0, Math.max(0, AT_ONCE - busy))) send(u)
}

function send({ key, file }: Upload) {
  change(key, { state: 'sending' })
  const request = new XMLHttpRequest()
  const form = new FormData()
  form.append('files', file, file.name)
  request.open('POST', '/api/uploads')
  request.setRequestHeader('X-Histokit', '1')
  request.upload.onprogress = (e) => { if (e.lengthComputable) change(key, { sent: e.loaded / e.total }) }
  request.onload = () => { change(key, result(request)); finish() }
  request.onerror = request.onabort = request.ontimeout = () => {
    change(key, { state: 'failed', note: 'the connection broke off' })
    finish()
  }
  request.send(form)
}

function result(request: XMLHttpRequest): Partial<Upload> {
  let body: (UploadAnswer & { detail?: unknown }) | null = null
  try { body = JSON.parse(request.responseText) } catch { /* no JSON: said below */ }
  if (request.status >= 400 || !body) {
    return { state: 'failed', note: typeof body?.detail === 'string' ? body.detail : `the server answered ${request.status}` }
  }
  const bad = body.refused?.[0]
  if (bad) return { state: 'refused', note: bad.why, sent: 1 }
  const good = body.accepted?.[0]
  if (!good) return { state: 'failed', note: 'the server named no file' }
  const state = good.changed ? 'changed' : good.known ? 'known' : 'stored'
  return { state, sent: 1, image: good.id, job: good.job }
}

function finish() {
  pump()
  if (uploads.value.some((u) => u.state === 'sending' || u.state === 'waiting')) return
  const bad = uploads.value.filter((u) => u.state === 'refused' || u.state === 'failed').length
  say(bad ? `${bad} of ${uploads.value.length} files could not be taken.` : 'All files are stored.', bad > 0)
  onUploaded()
}

addEventListener('beforeunload', (e) => { if (uploads.value.some((u) => u.state === 'sending' || u.state === 'waiting')) e.preventDefault() })

/** Every file below what was dropped, folders opened. */
export async function filesOf(data: DataTransfer): Promise<File[]> {
  const entries = [...data.items].map((i) => i.webkitGetAsEntry?.()).filter((e): e is FileSystemEntry => Boolean(e))
  if (!entries.length) return [...data.files]
  return (await Promise.all(entries.map(inside))).flat()
}

async function inside(entry: FileSystemEntry): Promise<File[]> {
  if (entry.isFile) return [await new Promise<File>((yes, no) => (entry as FileSystemFileEntry).file(yes, no))]
  const reader = (entry as FileSystemDirectoryEntry).createReader()
  const found: FileSystemEntry[] = []
  for (;;) {                          // readEntries hands out a hundred at a time
    const some = await new Promise<FileSystemEntry[]>((yes, no) => reader.readEntries(yes, no))
    if (!some.length) break
    found.push(...some)
  }
  return (await Promise.all(found.filter((e) => !e.name.startsWith('.')).map(inside))).flat()
}
