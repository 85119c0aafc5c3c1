// Edits on their way to the server. Each lies in localStorage under its own key until the server has answered,
// so that neither a lost network nor a closed tab loses one; its uid makes a second sending harmless.
import { computed, signal } from '@preact/signals'
import { ApiError, api } from './api'
import type { EventBody, Item, Scores } from './types'

export type Edit =
  | { kind: 'score'; uid: string; image: number; measure: string; value: number | null; seconds: number; draft_visible: boolean }
  | { kind: 'undo'; uid: string; image: number; measure?: string }
  | { kind: 'flag'; uid: string; image: number; on: boolean }
  | { kind: 'consensus'; uid: string; image: number; scores: Scores }
export type Entry = { key: string; edit: Edit; refused?: string }
export type SaveState = 'idle' | 'saving' | 'saved' | 'failed'

const entries = signal<Entry[]>([])
const sending = signal(false)
const trouble = signal<string | null>(null)
const everSaved = signal(false)
let prefix = ''
let answered: (item: Item) => void = () => {}
let timer: ReturnType<typeof setTimeout> | undefined
let pause = 0
let count = 0

export const waiting = computed(() => entries.value.filter((e) => !e.refused))
export const refused = computed(() => entries.value.filter((e) => e.refused))
export const problem = computed(() => trouble.value)
export const saveState = computed<SaveState>(() => {
  if (trouble.value && waiting.value.length) return 'failed'
  if (sending.value || waiting.value.length) return 'saving'
  return everSaved.value ? 'saved' : 'idle'
})

/** A random UUID, also where the page is served over plain HTTP and crypto.randomUUID is absent. */
export function newUid(): string {
  if (typeof crypto.randomUUID === 'function') return crypto.randomUUID()
  const b = crypto.getRandomValues(new Uint8Array(16))
  b[6] = (b[6]! & 0x0f) | 0x40
  b[8] = (b[8]! & 0x3f) | 0x80
  const hex = Array.from(b, (x) => x.toString(16).padStart(2, '0')).join('')
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-')
}

function stored(): Entry[] {
  const keys = Array.from({ length: localStorage.length }, (_, i) => localStorage.key(i)!)
  return keys.filter((k) => k.startsWith(prefix)).sort().flatMap((key) => {
    try { return [{ key, ...JSON.parse(localStorage.getItem(key)!) } as Entry] } catch { return [] }
  })
}

function reread() {
  if (!prefix) return
  const kept = stored()
  const inMemory = entries.value.filter((e) => e.key.startsWith('memory:'))
  entries.value = [...kept, ...inMemory]
}

function keep(edit: Edit): Entry {
  const key = `${prefix}${Date.now().toString().padStart(15, '0')}-${String(count++).padStart(6, '0')}-${edit.uid}`
  try {
    localStorage.setItem(key, JSON.stringify({ edit }))
    return { key, edit }
  } catch {                          // storage is full or forbidden: the tab's memory has to do until it is sent
    return { key: `memory:${key}`, edit }
  }
}

function drop(done: Entry[]) {
  for (const e of done) localStorage.removeItem(e.key)
  const keys = new Set(done.map((e) => e.key))
  entries.value = entries.value.filter((e) => !keys.has(e.key))
}

function refuse(entry: Entry, why: string) {
  const marked = { ...entry, refused: why }
  if (!entry.key.startsWith('memory:')) localStorage.setItem(entry.key, JSON.stringify({ edit: entry.edit, refused: why }))
  entries.value = entries.value.map((e) => (e.key === entry.key ? marked : e))
}

/** The first waiting edit, with the scores of the same image that follow it directly. */
function batch(all: Entry[], alone: boolean): Entry[] {
  const first = all[0]!
  if (alone || first.edit.kind !== 'score') return [first]
  const stop = all.findIndex((e) => e.edit.kind !== 'score' || e.edit.image !== first.edit.image)
  return all.slice(0, Math.min(stop < 0 ? all.length : stop, 50))
}

function send(group: Entry[]): Promise<Item> {
  const { edit } = group[0]!
  if (edit.kind === 'undo') return api.undo(edit.image, edit.uid, edit.measure)
  if (edit.kind === 'flag') return api.flag(edit.image, edit.uid, edit.on)
  if (edit.kind === 'consensus') return api.consensus(edit.image, edit.uid, edit.scores)
  const events = group.map(({ edit }) => edit as Extract<Edit, { kind: 'score' }>)
    .map(({ uid, measure, value, seconds, draft_visible }): EventBody => ({ uid, measure, value, seconds, draft_visible }))
  return api.save(edit.image, events)
}

/** Sends one group; true where the next may follow at once. */
async function sendOne(alone: boolean): Promise<'more' | 'alone' | 'stop'> {
  const group = batch(waiting.value, alone)
  try {
    const item = await send(group)
    drop(group)
    trouble.value = null
    pause = 0
    everSaved.value = true
    if (item && typeof item === 'object' && 'id' in item) answered(item)
    return 'more'
  } catch (error) {
    const e = error instanceof ApiError ? error : new ApiError(0, String(error))
    if (e.temporary || e.status === 401) { trouble.value = e.message; return 'stop' }
    if (group.length > 1) return 'alone'
    refuse(group[0]!, e.message)
    return 'more'
  }
}

async function drain() {
  let alone = false
  for (reread(); waiting.value.length; ) {
    const then = await sendOne(alone)
    if (then === 'stop') return retryLater()
    alone = then === 'alone'
  }
}

function retryLater() {
  pause = Math.min(pause ? pause * 2 : 1000, 30_000)
  clearTimeout(timer)
  timer = setTimeout(flush, pause)
}

/** Sends what waits; one tab of the browser at a time. */
export async function flush(): Promise<void> {
  if (sending.value || !prefix || !waiting.value.length) return
  sending.value = true
  clearTimeout(timer)
  try {
    if (navigator.locks) await navigator.locks.request(`${prefix}lock`, drain)
    else await drain()
  } finally {
    sending.value = false
  }
  if (waiting.value.length && !trouble.value) void flush()      // came in after the last look
}

/** Keeps an edit and sends it. */
export function enqueue(edit: Edit): void {
  entries.value = [...entries.value, keep(edit)]
  void flush()
}

/** Gives up an edit that the server refused. */
export const discard = (entry: Entry) => drop([entry])

/** Opens the outbox of one person in one study; what an earlier tab left is sent now. */
export function openOutbox(study: string, user: string, onAnswer: (item: Item) => void): void {
  prefix = `histokit/outbox/${study}/${user}/`
  answered = onAnswer
  trouble.value = null
  entries.value = []
  reread()
  void flush()
}

export function closeOutbox(): void {
  prefix = ''
  clearTimeout(timer)
  entries.value = []
  trouble.value = null
  everSaved.value = false
}

addEventListener('online', () => { pause = 0; void flush() })
addEventListener('storage', (e) => { if (prefix && (e.key === null || e.key.startsWith(prefix))) reread() })
addEventListener('beforeunload', (e) => { if (entries.value.some((x) => x.key.startsWith('memory:'))) e.preventDefault() })

/** The scores as they will be once everything that waits has been saved. */
export function overlaid(image: number, scores: Scores): Scores {
  const result = { ...scores }
  const before: { measure: string; value: number | null }[] = []
  for (const { edit } of waiting.value) {
    if (edit.image !== image) continue
    if (edit.kind === 'score') {
      before.push({ measure: edit.measure, value: result[edit.measure] ?? null })
      result[edit.measure] = edit.value
    } else if (edit.kind === 'undo') {
      const at = before.findLastIndex((b) => !edit.measure || b.measure === edit.measure)
      if (at >= 0) { const [b] = before.splice(at, 1); result[b!.measure] = b!.value }
    }
  }
  return result
}

export function overlaidFlag(image: number, flagged: boolean): boolean {
  const last = waiting.value.findLast(({ edit }) => edit.image === image && edit.kind === 'flag')
  return last?.edit.kind === 'flag' ? last.edit.on : flagged
}
