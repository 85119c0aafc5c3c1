// Pictures in: drop them, watch them go up, watch the queue draft them.
import { useSignal } from '@preact/signals'
import { useEffect } from 'preact/hooks'
import { api } from '../api'
import { attempt, isAdmin, jobs, live, mayScore, queueCounts, readJobs, say, study } from '../state'
import type { Job } from '../types'
import { addFiles, again, clearDone, filesOf, uploads, type Upload } from '../uploads'
import { Button, bytes, Field, Icon, when } from '../ui'

const stateWord: Record<Upload['state'], string> = {
  waiting: 'waiting', sending: 'going up', stored: 'stored', known: 'known already: its scores are kept', changed: 'other picture under a known name: scores kept, flagged',
  refused: 'refused', failed: 'failed',
}

function FileRow({ u }: { u: Upload }) {
  return (
    <li class={`file ${u.state}`}>
      <span class="file-name" title={u.file.name}>{u.image ? <a href={`#/review/${u.image}`}>{u.file.name}</a> : u.file.name}</span>
      <span class="file-size">{bytes(u.file.size)}</span>
      <progress max={1} value={u.state === 'waiting' ? 0 : u.sent} aria-label={`Progress of ${u.file.name}`} />
      <span class="file-state">{u.note ? `${stateWord[u.state]}: ${u.note}` : stateWord[u.state]}{u.state === 'sending' ? ` ${Math.floor(u.sent * 100)} %` : ''}</span>
      {u.state === 'failed' && <Button look="quiet" icon="retry" onClick={() => again(u.key)}>Again</Button>}
    </li>
  )
}

export function DropZone() {
  const over = useSignal(false)
  const drop = async (e: DragEvent) => {
    e.preventDefault()
    over.value = false
    if (e.dataTransfer) addFiles(await filesOf(e.dataTransfer))
  }
  return (
    <label class={`drop ${over.value ? 'over' : ''}`} onDragOver={(e) => { e.preventDefault(); over.value = true }}
      onDragLeave={() => { over.value = false }} onDrop={drop}>
      <Icon name="upload" size={30} />
      <b>Drop pictures or folders here, or choose them</b>
      <span>TIFF, PNG, JPEG; 50–110 MB and more is fine, as many as you like. You can go on scoring meanwhile.</span>
      <input type="file" multiple accept=".tif,.tiff,.png,.jpg,.jpeg,image/*" class="hidden" aria-label="Choose pictures"
        onChange={(e) => { addFiles(e.currentTarget.files ?? []); e.currentTarget.value = '' }} />
    </label>
  )
}

const jobWord: Record<Job['state'], string> = { Pending: 'waiting', Processing: 'in work', Completed: 'drafted', Failed: 'failed' }

function JobRow({ job }: { job: Job }) {
  const retry = async () => { if (await attempt(api.retry(job.id))) { say('Back in the queue.'); void readJobs() } }
  return (
    <tr>
      <td class="break"><a href={`#/review/${job.image_id}`}>{job.name ?? `picture ${job.image_id}`}</a></td>
      <td><span class={`state ${job.state}`}>{jobWord[job.state]}</span></td>
      <td class="break">{job.reason ?? ''}{job.attempts > 1 ? ` (attempt ${job.attempts})` : ''}</td>
      <td class="nowrap">{when(job.finished_at ?? job.created_at)}</td>
      <td>{job.state === 'Failed' && mayScore.value && <Button look="quiet" icon="retry" onClick={retry}>Again</Button>}</td>
    </tr>
  )
}

const rank: Record<Job['state'], number> = { Failed: 0, Processing: 1, Pending: 2, Completed: 3 }

function Queue() {
  const all = useSignal(false)
  const sorted = [...jobs.value.values()].sort((a, b) => rank[a.state] - rank[b.state] || (a.state === 'Completed' ? b.id - a.id : a.id - b.id))
  const rows = all.value ? sorted : sorted.slice(0, 50)
  const c = queueCounts.value
  return (
    <section aria-label="Queue">
      <h2>Queue <small class={live.value ? 'live' : 'off'}>{live.value ? 'live' : 'not connected'}</small></h2>
      <div class="tallies" role="status">
        <span><b>{c.Pending}</b> waiting</span><span><b>{c.Processing}</b> in work</span><span><b>{c.Completed}</b> drafted</span>
        <span class={c.Failed ? 'bad' : ''}><b>{c.Failed}</b> failed</span>
      </div>
      {!study.value?.model && <p class="notice quiet-notice">This study has no model: pictures are read and can be scored, drafts come once there is one.</p>}
      {rows.length > 0 && <div class="table-frame"><table class="table">
        <thead><tr><th scope="col">Picture</th><th scope="col">State</th><th scope="col">Reason</th><th scope="col">When</th><th scope="col"><span class="hidden">Action</span></th></tr></thead>
        <tbody>{rows.map((j) => <JobRow key={j.id} job={j} />)}</tbody>
      </table></div>}
      {sorted.length > rows.length && <Button look="quiet" onClick={() => { all.value = true }}>{`Show all ${sorted.length}`}</Button>}
    </section>
  )
}

function ServerFolder() {
  const path = useSignal('')
  const busy = useSignal(false)
  const take = async (e: Event) => {
    e.preventDefault()
    busy.value = true
    const answer = await attempt(api.folder(path.value.trim()))
    busy.value = false
    if (answer) { say('The folder is being read.'); path.value = ''; void readJobs() }
  }
  return (
    <details class="more"><summary>A folder on the server</summary>
      <form class="row" onSubmit={take}>
        <Field label="Path of the folder" note="Read where it lies; nothing goes over the network."><input value={path.value} required onInput={(e) => { path.value = e.currentTarget.value }} /></Field>
        <Button type="submit" disabled={busy.value}>Add</Button>
      </form>
    </details>
  )
}

export function UploadPage() {
  useEffect(() => { void readJobs() }, [])
  const done = uploads.value.filter((u) => !['waiting', 'sending'].includes(u.state)).length
  return (
    <div class="page">
      <header class="page-head"><h1>Add pictures</h1></header>
      {mayScore.value ? <DropZone /> : <p class="notice">You may look, not add pictures.</p>}
      {uploads.value.length > 0 && (
        <section aria-label="Files">
          <h2>Files <small>{done} of {uploads.value.length}</small><span class="spring" />{done > 0 && <Button look="quiet" onClick={clearDone}>Clear the finished</Button>}</h2>
          <ul class="files">{uploads.value.map((u) => <FileRow key={u.key} u={u} />)}</ul>
        </section>
      )}
      {isAdmin.value && <ServerFolder />}
      <Queue />
    </div>
  )
}
