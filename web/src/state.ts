// What the whole page knows: who is signed in, the study, the images met so far, the queue, the address.
import { computed, effect, signal, type Signal } from '@preact/signals'
import { ApiError, anyQuery, api, onSignedOut, type Query } from './api'
import { closeOutbox, openOutbox } from './outbox'
import type { ImageDetail, Item, Job, Measure, Session, Study } from './types'

export const session = signal<Session | null>(null)
export const study = signal<Study | null>(null)
export const failure = signal<string | null>(null)
export const measures = computed<Measure[]>(() => study.value?.measures ?? [])
export const mayScore = computed(() => session.value?.role === 'scorer' || session.value?.role === 'admin')
export const isAdmin = computed(() => session.value?.role === 'admin')

// ---- address: #/review/12
export const address = signal(location.hash.slice(1) || '/')
addEventListener('hashchange', () => { address.value = location.hash.slice(1) || '/' })
export const go = (to: string) => { location.hash = to }
export const parts = computed(() => address.value.split('?')[0]!.split('/').filter(Boolean))

// ---- short messages
export interface Toast { id: number; text: string; bad: boolean }
export const toasts = signal<Toast[]>([])
let toastCount = 0
export function say(text: string, bad = false): void {
  const id = ++toastCount
  toasts.value = [...toasts.value.slice(-2), { id, text, bad }]
  setTimeout(() => { toasts.value = toasts.value.filter((t) => t.id !== id) }, bad ? 9000 : 3500)
}
/** Runs a call of the server and shows its line where it fails; null then. */
export async function attempt<T>(work: Promise<T>): Promise<T | null> {
  try { return await work } catch (error) {
    if (!(error instanceof ApiError && error.status === 401)) say((error as Error).message, true)
    return null
  }
}

// ---- images met so far, each its own signal: a save redraws one row
const known = new Map<number, Signal<Item | null>>()
export function itemOf(id: number): Signal<Item | null> {
  let s = known.get(id)
  if (!s) known.set(id, (s = signal<Item | null>(null)))
  return s
}
const versions = new Map<number, number>()
export function putItem(item: Item): void {
  const s = itemOf(item.id)
  versions.set(item.id, (versions.get(item.id) ?? 0) + 1)
  s.value = { ...s.value, ...item }
}
/** Reads an image; where a save was answered meanwhile the older answer is left and read again. */
export async function readImage(id: number): Promise<ImageDetail> {
  for (;;) {
    const before = versions.get(id)
    const detail = await api.image(id)
    if (versions.get(id) === before) { putItem(detail); return detail }
  }
}

// ---- the list that the person works through
export const query = signal<Query>({ ...anyQuery })
export const listVersion = signal(0)          // grows where the list has to be read again
export const refreshList = () => { listVersion.value++ }

// ---- the queue, live
export const jobs = signal<Map<number, Job>>(new Map())
export const live = signal(false)
export const imageChanged = signal<{ id: number; n: number }>({ id: 0, n: 0 })
let stream: EventSource | null = null
let again: ReturnType<typeof setTimeout> | undefined

function onJob(job: Job) {
  jobs.value = new Map(jobs.value).set(job.id, job)
  if (job.state === 'Completed' || job.state === 'Failed') void refreshItem(job.image_id)
}
async function refreshItem(id: number) {
  if (!known.has(id)) { laterList(); return }
  const item = await readImage(id).catch(() => null)
  if (item) imageChanged.value = { id, n: imageChanged.value.n + 1 }
}
let listTimer: ReturnType<typeof setTimeout> | undefined
function laterList() {
  clearTimeout(listTimer)
  listTimer = setTimeout(() => { refreshList(); void readStudy() }, 700)
}
export const onUploaded = laterList
export async function readJobs(): Promise<void> {
  const all = await attempt(api.jobs())
  if (all) jobs.value = new Map(all.map((j) => [j.id, j]))
}
function openStream() {
  stream?.close()
  clearTimeout(again)
  stream = new EventSource('/api/events/stream')
  stream.onopen = () => { live.value = true; void readJobs() }
  stream.onerror = () => {
    live.value = false
    if (stream?.readyState === EventSource.CLOSED) again = setTimeout(openStream, 5000)      // refused, not only cut off
  }
  const on = <T>(name: string, f: (data: T) => void) =>
    stream!.addEventListener(name, (e) => { try { f(JSON.parse((e as MessageEvent).data)) } catch { /* not ours */ } })
  on<Job>('job', (j) => { onJob(j); if (j.state === 'Completed') laterList() })
  on<{ id: number }>('image', (m) => void refreshItem(m.id))
  on('model', () => { void readStudy(); refreshList() })
}
export const queueCounts = computed(() => {
  const counts = { Pending: 0, Processing: 0, Completed: 0, Failed: 0 }
  for (const j of jobs.value.values()) counts[j.state]++
  return counts
})

// ---- session
export async function readStudy(): Promise<void> {
  const s = await api.study().catch(() => null)
  if (s) study.value = s
}
export async function readSession(): Promise<void> {
  try {
    await enter(await api.session())
    failure.value = null
  } catch (error) { failure.value = (error as Error).message }
}
export async function enter(s: Session): Promise<void> {
  const signedIn = s.single || s.user !== null
  if (signedIn && !s.setup_needed) {
    study.value = await api.study()
    openOutbox(s.study_id ?? s.study, String(s.user?.id ?? 'single'), putItem)
    openStream()
  }
  session.value = s
}
function leave() {
  stream?.close()
  clearTimeout(again)
  stream = null
  live.value = false
  closeOutbox()
  known.clear()
  if (session.value) session.value = { ...session.value, user: null, role: null }
}
export async function logout(): Promise<void> {
  await attempt(api.logout())
  leave()
  go('/')
}
onSignedOut(() => {
  if (!session.value?.user) return
  say('Your session has ended: sign in again, nothing is lost.', true)
  leave()
})

// ---- settings of this browser
function setting<T extends string | number | boolean>(key: string, first: T): Signal<T> {
  const read = () => { try { return JSON.parse(localStorage.getItem(`histokit/${key}`) ?? '') as T } catch { return first } }
  const s = signal<T>(read())
  effect(() => { try { localStorage.setItem(`histokit/${key}`, JSON.stringify(s.value)) } catch { /* private mode */ } })
  return s
}
export const theme = setting<'auto' | 'light' | 'dark'>('theme', 'auto')
export const listOpen = setting<boolean>('list', true)
export const brightness = setting<number>('brightness', 1)
export const contrast = setting<number>('contrast', 1)
export const mapOpacity = setting<number>('map-opacity', 0.75)
effect(() => {
  const root = document.documentElement
  if (theme.value === 'auto') root.removeAttribute('data-theme')
  else root.setAttribute('data-theme', theme.value)
})
