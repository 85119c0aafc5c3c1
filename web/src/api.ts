// Calls of the server. An answer that is no success becomes an ApiError with the server's own line.
import type { Account, ActiveImage, Agreement, EventBody, ImageDetail, ImageList, Item, Job, Scores, Session, Study, StudyChange, UploadAnswer } from './types'

export class ApiError extends Error {
  readonly status: number
  constructor(status: number, message: string) {
    super(message)
    this.status = status
  }
  /** The network or the server is away: worth another try with the same body. */
  get temporary() { return this.status === 0 || this.status === 429 || this.status >= 500 }
}

type Listener = () => void
let signedOut: Listener = () => {}
/** Names what happens when the server says that the session is over. */
export const onSignedOut = (f: Listener) => { signedOut = f }

async function lineOf(answer: Response): Promise<string> {
  const body = await answer.json().catch(() => null) as { detail?: unknown } | null
  if (typeof body?.detail === 'string') return body.detail
  if (Array.isArray(body?.detail)) return body.detail.map((d: { msg?: string }) => d.msg ?? '').join(', ')
  return `the server answered ${answer.status}`
}

export async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
  const headers: Record<string, string> = { 'X-Histokit': '1', Accept: 'application/json' }
  if (body !== undefined) headers['Content-Type'] = 'application/json'
  let answer: Response
  try {
    answer = await fetch(path, { method, headers, credentials: 'same-origin', cache: 'no-store',
      body: body === undefined ? undefined : JSON.stringify(body) })
  } catch {
    throw new ApiError(0, 'the server cannot be reached')
  }
  if (answer.status === 401 && path !== '/api/login') signedOut()
  if (!answer.ok) throw new ApiError(answer.status, await lineOf(answer))
  return (answer.status === 204 ? undefined : await answer.json().catch(() => undefined)) as T
}

export interface Query {
  search: string
  group: string
  status: string
  scorer: string
  unscored: boolean
  far: boolean
  flagged: boolean
  sort: string
  order: 'asc' | 'desc'
}
export const anyQuery: Query = { search: '', group: '', status: '', scorer: '', unscored: false, far: false,
  flagged: false, sort: 'name', order: 'asc' }

export function queryString(q: Record<string, unknown>): string {
  const parts = Object.entries(q).filter(([, v]) => v !== '' && v !== false && v !== null && v !== undefined)
  return new URLSearchParams(parts.map(([k, v]) => [k, String(v)])).toString()
}

export const api = {
  session: () => call<Session>('GET', '/api/session'),
  setup: (name: string, password: string, code: string) => call<Session>('POST', '/api/setup', { name, password, code }),
  login: (name: string, password: string) => call<Session>('POST', '/api/login', { name, password }),
  logout: () => call<void>('POST', '/api/logout', {}),
  study: () => call<Study>('GET', '/api/study'),
  changeStudy: (change: StudyChange) => call<Study>('PATCH', '/api/study', change),
  images: (q: Partial<Query>, offset: number, limit: number) =>
    call<ImageList>('GET', `/api/images?${queryString({ ...q, offset, limit })}`),
  image: (id: number) => call<ImageDetail>('GET', `/api/images/${id}`),
  next: (after: number | null, direction: 'next' | 'previous', order: string) =>
    call<{ id: number | null }>('GET', `/api/next?${queryString({ after, direction, order })}`),
  save: (id: number, events: EventBody[]) => call<Item>('POST', `/api/images/${id}/events`, { events }),
  undo: (id: number, uid: string, measure?: string) => call<Item>('POST', `/api/images/${id}/undo`, { uid, measure }),
  accept: (id: number, uid: string) => call<Item>('POST', `/api/images/${id}/accept`, { uid }),
  flag: (id: number, uid: string, on: boolean) => call<Item>('POST', `/api/images/${id}/flag`, { uid, on }),
  consensus: (id: number, uid: string, scores: Scores) =>
    call<Item>('PUT', `/api/images/${id}/consensus`, { uid, scores }),
  jobs: (state?: string) => call<Job[]>('GET', `/api/jobs?${queryString({ state })}`),
  retry: (id: number) => call<Job>('POST', `/api/jobs/${id}/retry`, {}),
  folder: (path: string) => call<UploadAnswer>('POST', '/api/folder', { path }),
  agreement: () => call<Agreement>('GET', '/api/agreement'),
  active: () => call<ActiveImage[]>('GET', '/api/active'),
  people: () => call<Account[]>('GET', '/api/people'),
  addPerson: (body: { name: string; password: string; role: string }) => call<Account>('POST', '/api/people', body),
  changePerson: (id: number, body: Record<string, unknown>) => call<Account>('PATCH', `/api/people/${id}`, body),
  removePerson: (id: number) => call<void>('DELETE', `/api/people/${id}`),
}

/** The address of a picture in small; it changes with the picture's bytes. */
export const thumb = (item: Item, size: number) =>
  `/api/images/${item.id}/thumb.jpg?size=${size}${item.sha256 ? `&v=${item.sha256.slice(0, 8)}` : ''}`
